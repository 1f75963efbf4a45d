"""Where it is asked for, a token's result does not depend on how many other tokens there are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor_config
import torch.nn.functional as F

import gatefuse
from tests.support.comparison import BACKEND

H = 64
ROWS = (1, 8, 4096)


def gate(x: torch.Tensor, w: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(F.linear(torch.tanh(x), w)) * v


@contextlib.contextmanager
def deterministic_algorithms() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def setting(name: str) -> Any:
    if name == "deterministic":
        return deterministic_algorithms()
    if not hasattr(inductor_config, name):
        pytest.skip(f"this PyTorch has no torch._inductor.config.{name}")
    return inductor_config.patch({name: True})


@pytest.mark.parametrize("asked", ["batch_invariant", "deterministic", "option", "environment"])
def test_compiled(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """4096 rows of float32 are above the size from which the gate is otherwise left alone."""
    monkeypatch.setattr("gatefuse.inductor.cost_model.LARGE_RESULT", {2: 1 << 10, 4: 1 << 10})
    x, w, v = torch.randn(max(ROWS), H), torch.randn(1, H) * 0.2, torch.randn(max(ROWS), H)
    given, block = {}, contextlib.nullcontext()
    if asked == "option":
        given = {"gatefuse.batch_invariant": True}
    elif asked == "environment":
        monkeypatch.setenv("GATEFUSE_BATCH_INVARIANT", "1")
    else:
        block = setting(asked)
    with block, torch.no_grad(), gatefuse.record() as report:
        results = []
        for rows in ROWS:
            torch._dynamo.reset()
            compiled = torch.compile(gate, backend=BACKEND, dynamic=False, options=given)
            results.append(compiled(x[:rows], w, v[:rows]))
    assert report.fused == len(ROWS)
    for rows, result in zip(ROWS, results):
        assert torch.equal(result, results[-1][:rows])


def test_without_it_the_number_of_rows_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gatefuse.inductor.cost_model.LARGE_RESULT", {2: 1 << 10, 4: 1 << 10})
    with torch.no_grad(), gatefuse.fusing() as report:
        for rows in (1, 4096):
            torch._dynamo.reset()
            torch.compile(gate, dynamic=False)(
                torch.randn(rows, H), torch.randn(1, H), torch.randn(rows, H)
            )
    assert report.fused == 1


@pytest.mark.parametrize("asked", ["batch_invariant", "deterministic", "environment"])
@pytest.mark.parametrize("width", [64, 2048])
def test_eager_op(asked: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, v = torch.randn(300, width), torch.randn(1, width) * 0.1, torch.randn(300, 16)
    block: Any = contextlib.nullcontext()
    if asked == "environment":
        monkeypatch.setenv("GATEFUSE_BATCH_INVARIANT", "1")
    else:
        block = setting(asked)
    with block:
        whole = gatefuse.linear_sigmoid_mul(x, w, v)
        for rows in (1, 2, 7, 64):
            part = gatefuse.linear_sigmoid_mul(x[:rows], w, v[:rows])
            assert torch.equal(part, whole[:rows])


def test_the_option_is_inductors_too() -> None:
    if not hasattr(inductor_config, "batch_invariant"):
        pytest.skip("this PyTorch has no torch._inductor.config.batch_invariant")
    assert gatefuse.options(batch_invariant=True)["batch_invariant"] is True
    assert "batch_invariant" not in gatefuse.options()
    assert gatefuse.options({"batch_invariant": False}, batch_invariant=True) | {} == {
        **gatefuse.options({"batch_invariant": False}, batch_invariant=True),
        "batch_invariant": False,
    }


@pytest.mark.parametrize("width", [1024, 2048, 4096, 7168])
@pytest.mark.parametrize("dependent", [False, True])
def test_launch_of_any_number_of_rows(width: int, dependent: bool) -> None:
    """The shape of a launch without a number of rows is one that some number of rows has."""
    kernels = pytest.importorskip("gatefuse.kernels")
    shape = kernels.launch_config(None, width, width, addend=True, dependent=dependent)
    others = [
        kernels.launch_config(rows, width, width, addend=True, dependent=dependent)
        for rows in (1, 16, 256, 1024, 8192)
    ]
    assert (shape.block_h, shape.num_warps) in {(s.block_h, s.num_warps) for s in others}
