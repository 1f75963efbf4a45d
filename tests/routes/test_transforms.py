"""Function transforms, checkpointing and memory budgets: graphs that PyTorch makes of a model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch.utils import checkpoint as ck

import gatefuse
from tests.routes.gates import WIDTH, SharedExpert, judge_all, make_expert, make_input, train_step
from tests.support.comparison import compile_and_compare, tensors
from tests.support.gradients import rewritten, rewritten_gradients

Run = Callable[..., Any]
REWRITES = pytest.mark.parametrize("rewrites", [False, True], ids=["kept", "rewritten"])


def gate(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(F.linear(x, w)) * v


def operands(grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    w = make_input(1, seed=2) / WIDTH**0.5
    return make_input(grad=grad), w.detach().requires_grad_(grad), make_input(seed=3, grad=grad)


def loss(*args: Tensor) -> Tensor:
    return gate(*args).square().sum()


def vmapped_rows(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return torch.func.vmap(gate, (0, None, 0))(x, w, v)


def vmapped_models(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """An ensemble: each model has a gate of its own, which is no `linear(H -> 1)` of all rows."""
    weights = torch.stack([w, -w])
    return torch.func.vmap(gate, (None, 0, None))(x, weights, v)


def tangents(x: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = torch.func.jvp(gate, (x, w, v), (v, w, x))
    return result


def gradients(x: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    value: tuple[Tensor, Tensor] = torch.func.grad_and_value(loss, argnums=1)(x, w, v)
    return value


def per_sample_gradients(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    result: Tensor = torch.func.vmap(torch.func.grad(loss, argnums=1), (0, None, 0))(x, w, v)
    return result


@pytest.mark.parametrize(
    ("fn", "fused"),
    [
        (vmapped_rows, 1),
        (vmapped_models, 0),
        (tangents, 1),
        (gradients, 1),
        (per_sample_gradients, 1),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_transforms_inside(fn: Run, fused: int) -> None:
    comparison = compile_and_compare(fn, operands(), fullgraph=True)
    comparison.check()
    assert comparison.report.fused == fused, comparison.report
    assert fused or all(r.reason for r in comparison.report.rejections)


def outcome(transform: Run, fn: Run) -> list[Tensor] | str:
    try:
        return tensors(transform(fn))
    except Exception as e:
        return type(e).__name__


@pytest.mark.parametrize("name", ["vmap", "jvp", "grad"])
def test_transforms_around_end_as_without_gatefuse(name: str) -> None:
    """PyTorch decides whether a transform may go around compiled code; gatefuse changes nothing."""
    x, w, v = operands()
    transforms: dict[str, Run] = {
        "vmap": lambda f: torch.func.vmap(f, (0, None, 0))(x, w, v),
        "jvp": lambda f: torch.func.jvp(f, (x, w, v), (v, w, x)),
        "grad": lambda f: torch.func.grad(lambda *a: f(*a).square().sum(), argnums=1)(x, w, v),
    }
    alone = outcome(transforms[name], torch.compile(gate))
    torch._dynamo.reset()
    with gatefuse.fusing():
        fused = outcome(transforms[name], torch.compile(gate))
    if isinstance(alone, str):
        assert fused == alone
        return
    doubles = tuple(t.double() for t in (x, w, v))
    x, w, v = doubles
    reference = outcome(transforms[name], gate)
    assert isinstance(fused, list) and isinstance(reference, list)
    judge_all(fused, alone, reference)


@pytest.mark.parametrize("compiled_inside", [False, True], ids=["inside", "around"])
def test_functional_call(compiled_inside: bool) -> None:
    model, x = make_expert(), make_input()

    def call(model: nn.Module, x: Tensor, weights: dict[str, Tensor]) -> Tensor:
        result: Tensor = torch.func.functional_call(model, weights, (x,))
        return result

    weights = {k: -p.detach() for k, p in model.named_parameters()}
    doubles = {k: p.double() for k, p in weights.items()}
    with gatefuse.fusing(expect=1), torch.no_grad():
        if compiled_inside:
            # The wrapper that torch.compile makes is a module with the model under a name.
            inner = {f"_orig_mod.{k}": p for k, p in weights.items()}
            fused = call(torch.compile(model), x, inner)  # type: ignore[arg-type]
        else:
            fused = torch.compile(functools.partial(call, model))(x, weights)
    with torch.no_grad():
        eager, reference = call(model, x, weights), call(model, x.double(), doubles)
    judge_all([fused], [eager], [reference])


class Checkpointed(SharedExpert):
    """The expert under one kind of activation checkpointing."""

    def __init__(self, **how: Any) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = ck.checkpoint(super().forward, x, **self.how)
        return result


def save_linears(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> ck.CheckpointPolicy:
    saved = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return ck.CheckpointPolicy.MUST_SAVE if saved else ck.CheckpointPolicy.PREFER_RECOMPUTE


selective = functools.partial(ck.create_selective_checkpoint_contexts, save_linears)


@pytest.mark.parametrize(
    "how",
    [
        {"use_reentrant": True},
        {"use_reentrant": False},
        {"use_reentrant": False, "context_fn": selective},
    ],
    ids=["reentrant", "non-reentrant", "selective"],
)
@REWRITES
def test_checkpointing(how: dict[str, Any], rewrites: bool) -> None:
    torch.manual_seed(0)
    model, x = Checkpointed(**how), make_input(grad=True)
    eager = train_step(model, x)
    with gatefuse.fusing() as report, rewritten_gradients(rewrites):
        fused = train_step(torch.compile(model), x)  # type: ignore[arg-type]
    judge_all(fused, eager, train_step(model.double(), x.detach().double().requires_grad_()))
    assert sum(g.fused for g in report.graphs if g.phase != "backward") == 1, report
    if rewrites:
        assert rewritten(report) == 1


@pytest.mark.parametrize("budget", [0.0, 0.5])
@REWRITES
def test_activation_memory_budget(budget: float, rewrites: bool) -> None:
    budgeted = torch._functorch.config.patch(activation_memory_budget=budget)
    with budgeted, rewritten_gradients(rewrites):
        comparison = compile_and_compare(make_expert(), (make_input(grad=True),), grad=True)
    comparison.check()
    assert sum(g.fused for g in comparison.report.graphs if g.phase == "forward") == 1
    if rewrites:
        assert rewritten(comparison.report) == 1


@REWRITES
def test_compiled_autograd(rewrites: bool) -> None:
    """The forward's gate is fused; the compiled backward gives the gradients that eager gives."""
    model, x = make_expert(), make_input(grad=True)

    eager = train_step(model, x)
    compiled_backward = compiled_autograd._enable(torch.compile())
    with gatefuse.fusing(expect=1) as report, compiled_backward, rewritten_gradients(rewrites):
        fused = train_step(torch.compile(model), x)  # type: ignore[arg-type]
    reference = train_step(model.double(), x.detach().double().requires_grad_())
    judge_all(fused, eager, reference)
    assert [g.phase for g in report.graphs] == ["forward", "backward"]
    if rewrites:
        assert rewritten(report) == 1
