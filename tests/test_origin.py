"""Names of layers and lines, as a report shows them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gatefuse
from gatefuse.advice import _ADVICE, advice
from gatefuse.origin import layers_as_text, module_name


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("L['self'].layers.0.mlp", "layers.0.mlp"),
        ("L['self'].layers[0].mlp", "layers.0.mlp"),
        ("L['self']._modules['layers']._modules['11'].mlp", "layers.11.mlp"),
        ("L['model'].model.layers.3", "model.layers.3"),
        ("L['self']._orig_mod.mlp", "mlp"),
        ("L['self']", ""),
    ],
)
def test_module_name(path: str, name: str) -> None:
    assert module_name(path) == name


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        (["layers.0.mlp", "layers.1.mlp", "layers.2.mlp"], "layers.0-2.mlp"),
        (["layers.0.mlp", "layers.2.mlp", "layers.3.mlp"], "layers.0,2-3.mlp"),
        (["layers.10.mlp", "layers.9.mlp", "layers.9.mlp"], "layers.9-10.mlp"),
        (["mlp", "layers.1.mlp"], "mlp, layers.1.mlp"),
        (["a.0.b.1", "a.0.b.2"], "a.0.b.1, a.0.b.2"),
        (["conv2d.gate"], "conv2d.gate"),
        (["layers.0", "layers.1"], "layers.0-1"),
        ([], ""),
    ],
)
def test_layers_as_text(layers: list[str], text: str) -> None:
    assert layers_as_text(layers) == text


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared_expert_gate = nn.Linear(64, 1, bias=False)
        self.two = nn.Linear(64, 2)
        self.row = nn.Parameter(torch.randn(1, 64))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.sigmoid(self.shared_expert_gate(x)) * x
        y = y * torch.sigmoid(x @ self.row.t())
        return torch.sigmoid(self.two(x))[..., :1] * y + nn.functional.silu(y)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Mlp() for _ in range(2)])
        self.score = nn.Linear(64, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for layer in self.layers:
            x = layer(x)
        return x, self.score(x)


def test_gates_are_counted_in_the_model_and_grouped_by_line() -> None:
    with torch.no_grad():
        report = gatefuse.explain(Model(), torch.randn(5, 64))
    assert report.model is not None
    of_layer = ("row", "shared_expert_gate")
    names = [f"layers.{i}.{name}" for i in range(2) for name in of_layer]
    assert report.model.gates == report.model.fused == names
    assert report.model.not_compiled == []
    assert report.verdict == "4 of 4 gates fused in 1 graph"
    assert {s.layer for s in report.sites} == {"layers.0", "layers.1"}
    kinds = sorted(r.kind for r in report.rejections)
    assert kinds == ["near miss", "near miss"]  # sigmoid of silu is no aten.sigmoid on the CPU
    lines = str(report).splitlines()
    first = Mlp.forward.__code__.co_firstlineno
    assert f"  test_origin.py:{first + 1}, in forward" in lines
    assert "    y = torch.sigmoid(self.shared_expert_gate(x)) * x" in lines
    assert "    2 gates, 5 x 64, float32, in layers.0-1" in lines
    assert "  2 near misses left alone:" in lines
    assert "      to do: `Linear(H -> 2)`: one logit per token is needed" in lines


class SumOfProducts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid((x * self.w).sum(-1, keepdim=True)) * x


class Computed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x @ self.a.weight.sum(0, keepdim=True).t()) * x


class TwoInOneLine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(1, 64)), nn.Parameter(torch.randn(64, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x @ self.a.t()) * x.cos() + torch.sigmoid(x @ self.b) * x


@pytest.mark.parametrize(
    ("model", "names"),
    [(SumOfProducts, None), (Computed, None), (TwoInOneLine, ["a", "b"])],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_no_gate_is_missed_however_it_is_written(
    model: type[nn.Module], names: list[str] | None
) -> None:
    """A weight of the model itself, a sum of products, a weight that is computed."""
    line = model.forward.__code__.co_firstlineno + 1
    expected = names or [f"test_origin.py:{line}, in forward"]
    with torch.no_grad():
        for report in (
            gatefuse.explain(model(), torch.randn(5, 64)),
            gatefuse.scan(model(), (torch.randn(5, 64),)),
        ):
            assert report.model is not None
            assert report.model.gates == report.model.fused == expected
            assert report.verdict.startswith(f"{len(expected)} of {len(expected)} gates fuse")


def test_advice_is_for_reasons_that_exist() -> None:
    """Each pattern is found in the sources, where a sentence may go over several lines."""
    folder = Path(gatefuse.__file__).parent / "inductor"
    text = " ".join(path.read_text() for path in sorted(folder.glob("*.py")))
    text = re.sub(r'"\s*f?"', "", text)
    for pattern, _ in _ADVICE:
        for piece in re.split(r"[|^]|\(\?[^)]*\)|\.\+", pattern):
            assert piece.replace("\\", "") in text, pattern


def test_advice() -> None:
    assert advice("the linear has 4 outputs, not 1") == (
        "`Linear(H -> 4)`: one logit per token is needed"
    )
    assert advice("nothing of the kind") is None
