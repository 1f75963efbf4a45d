"""Tensors and modules of other kinds: weight subclasses, jagged tensors, LoRA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

import gatefuse
from tests.routes.gates import WIDTH, SharedExpert, judge_all, make_expert, make_input
from tests.support.comparison import compile_and_compare, tensors


class Scaled(Tensor):
    """An int8 weight with a scale for each row, as quantisation libraries have it: a traceable
    wrapper that is dequantised where it meets an operator."""

    def __new__(cls, data: Tensor, scale: Tensor) -> Scaled:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined,no-any-return]
            cls, data.shape, dtype=scale.dtype, strides=data.stride()
        )

    def __init__(self, data: Tensor, scale: Tensor) -> None:
        self.data8, self.scale = data, scale

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Scaled{tuple(self.shape)}"

    @classmethod
    def quantise(cls, weight: Tensor) -> Scaled:
        scale = weight.abs().amax(1, keepdim=True) / 127
        return cls((weight / scale).round().to(torch.int8), scale)

    def dequantise(self) -> Tensor:
        return self.data8.to(self.scale.dtype) * self.scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["data8", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner: Any, meta: Any, size: Any, stride: Any) -> Scaled:
        return Scaled(inner["data8"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].data8.detach(), args[0].scale.detach())
        args, kwargs = torch.utils._pytree.tree_map_only(cls, cls.dequantise, (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            return F.linear(args[0], args[1].dequantise(), *args[2:], **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})


def test_quantised_weights() -> None:
    model, x = make_expert(), make_input()
    wide = make_expert().double()
    for name in ("gate", "up", "down"):
        quantised = Scaled.quantise(getattr(model, name).weight.detach())
        getattr(model, name).weight = nn.Parameter(quantised, requires_grad=False)
        getattr(wide, name).weight = nn.Parameter(quantised.dequantise().double())
    with torch.no_grad(), gatefuse.fusing(expect=1):
        fused = torch.compile(model, fullgraph=True)(x)
    with torch.no_grad():
        judge_all([fused], [model(x)], [wide(x.double())])


def test_subclass_of_two_tensors() -> None:
    """Every operator of the subclass is two of the graph's, and so is the gate."""

    def both(weight: Tensor) -> TwoTensor:
        return TwoTensor(weight.detach().clone(), -weight.detach())

    model, wide, x = make_expert(), make_expert().double(), make_input()
    for m in (model, wide):
        for child in m.children():
            child.weight = nn.Parameter(both(child.weight), requires_grad=False)
    with torch.no_grad(), gatefuse.fusing(expect=2):
        fused = torch.compile(model, fullgraph=True)(x)
    with torch.no_grad():
        eager, reference = model(x), wide(x.double())
    for part in ("a", "b"):
        judge_all(*([getattr(t, part)] for t in (fused, eager, reference)))


def jagged_gate(x: Tensor, w: Tensor) -> Tensor:
    return torch.sigmoid(F.linear(x, w)) * torch.tanh(x)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_jagged_tensors(grad: bool) -> None:
    """Rows of several sequences in one tensor: their number is a symbol of the graph."""
    w = make_input(1, seed=2) / WIDTH**0.5

    def run(gate: Any, dtype: torch.dtype, *offsets: int) -> list[Tensor]:
        values = make_input(offsets[-1]).to(dtype).requires_grad_(grad)
        weight = w.to(dtype).requires_grad_(grad)
        x = torch.nested.nested_tensor_from_jagged(values, torch.tensor(offsets))
        out = gate(x, weight).values()
        if not grad:
            return [out]
        return [out, *torch.autograd.grad(out.square().sum(), (values, weight))]

    with gatefuse.fusing() as report:
        compiled = torch.compile(jagged_gate)
        fused = [run(compiled, torch.float32, *o) for o in ((0, 3, 4, 9), (0, 6, 8, 8))]
    eager = [run(jagged_gate, torch.float32, *o) for o in ((0, 3, 4, 9), (0, 6, 8, 8))]
    exact = [run(jagged_gate, torch.float64, *o) for o in ((0, 3, 4, 9), (0, 6, 8, 8))]
    for results in zip(fused, eager, exact, strict=True):
        judge_all(*results)
    forward = [g.fused for g in report.graphs if g.phase != "backward"]
    assert forward and set(forward) == {1}, report


class Lora(nn.Module):
    """`base(x) + B(A(x))`, the base frozen: what PEFT puts in the place of a linear layer."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.A = nn.Linear(base.in_features, rank, bias=False)
        self.B = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base(x) + self.B(self.A(x))
        return result


def with_lora(*names: str) -> SharedExpert:
    model = make_expert()
    for name in names:
        setattr(model, name, Lora(getattr(model, name)))
    return model


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_lora_around_the_gate(grad: bool) -> None:
    comparison = compile_and_compare(with_lora("up", "down"), (make_input(grad=grad),), grad=grad)
    comparison.check()
    forward = [g for g in comparison.report.graphs if g.phase != "backward"]
    assert sum(g.fused for g in forward) == 1, comparison.report


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_lora_on_the_gate(grad: bool) -> None:
    """The logit is a sum of two linears: left alone, and said so."""
    inputs = (make_input(grad=grad),)
    comparison = compile_and_compare(with_lora("gate"), inputs, grad=grad, alone=True)
    comparison.check_identical()
    forward = next(g for g in comparison.report.graphs if g.phase != "backward")
    assert forward.fused == 0
    assert [r.reason for r in forward.rejections] == ["the bias differs from row to row"]


def test_merged_lora_on_the_gate() -> None:
    model, x = with_lora("gate"), make_input()
    with torch.no_grad():
        lora, merged = model.gate, make_expert()
        assert isinstance(lora, Lora)
        merged.gate.weight += lora.B.weight @ lora.A.weight
    comparison = compile_and_compare(merged, (x,))
    comparison.check()
    assert comparison.report.fused == 1
    assert tensors(comparison.fused)
