"""Compile with and without gatefuse, run eager and in float64 beside it, and compare."""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import gatefuse
from gatefuse.backend import gatefuse_backend
from tests.support.cuda_rewrites import emulate_coordinate_descent
from tests.support.form_table import Form
from tests.support.forms import linear, make_inputs
from tests.support.judge import assert_identical, judge

LOW_PRECISION = (torch.float16, torch.bfloat16, torch.float32)
INSTALLED = any(d.name == "gatefuse" for d in importlib.metadata.distributions())
#: By name where the entry point is registered; a plain checkout has the function.
BACKEND: Any = "gatefuse" if INSTALLED else gatefuse_backend
Run = Callable[..., Any]


class _Float64(TorchDispatchMode):
    """Turns every request for a lower float dtype, as by `.float()`, into one for float64."""

    supports_higher_order_operators = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") in LOW_PRECISION:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def tensors(tree: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor)]


def _leaves(fn: Run, inputs: tuple[Any, ...]) -> list[Tensor]:
    parameters = list(fn.parameters()) if isinstance(fn, nn.Module) else []
    return [t for t in [*tensors(inputs), *parameters] if t.requires_grad]


def _run(run: Run, fn: Run, inputs: tuple[Any, ...], grad: bool) -> list[Tensor]:
    """The outputs of `run`, and with `grad` the gradients of the inputs and parameters of `fn`."""
    torch.manual_seed(0)
    if not grad:
        with torch.no_grad():
            return tensors(run(*inputs))
    outputs = tensors(run(*inputs))
    generator = torch.Generator().manual_seed(1)
    # Eighths are exact in every dtype: the same cotangents for all runs, without a rounding.
    cotangents = [
        (torch.randint(-8, 9, t.shape, generator=generator) / 8).to(t.device, t.dtype)
        for t in outputs
    ]
    leaves = _leaves(fn, inputs)
    gradients = torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True)
    zeros = [torch.zeros_like(t) for t in leaves]
    return outputs + [z if g is None else g for g, z in zip(gradients, zeros, strict=True)]


def _reference(fn: Run, inputs: tuple[Any, ...], grad: bool) -> list[Tensor]:
    def double(t: Tensor) -> Tensor:
        return t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t

    if isinstance(fn, nn.Module):
        fn = copy.deepcopy(fn).double()
    wide = pytree.tree_map_only(Tensor, double, inputs)
    with _Float64():
        return _run(fn, fn, wide, grad)


@dataclass
class Comparison:
    """One function, run four ways. Lists hold outputs, then gradients where they were asked for."""

    report: gatefuse.Report
    fused: list[Tensor]
    eager: list[Tensor]
    reference: list[Tensor]
    inductor: list[Tensor] | None
    grad: bool

    def check(self, working_dtype: torch.dtype | None = None) -> None:
        """Assert the tolerance on every output and gradient."""
        results = zip(self.fused, self.eager, self.reference, strict=True)
        for i, (fused, eager, reference) in enumerate(results):
            if eager.is_floating_point():
                # The compiler may choose the strides of gradients, but not those of outputs.
                strides = not self.grad or eager.requires_grad
                judge(f"result {i}", fused, eager, reference, working_dtype, strides)
            else:
                assert torch.equal(fused, eager), f"result {i}"

    def check_identical(self) -> None:
        """Assert that gatefuse changed no bit of what Inductor alone gives."""
        assert self.inductor is not None, "compile_and_compare(..., alone=True)"
        assert_identical(self.fused, self.inductor)


def compile_and_compare(
    fn: Run,
    inputs: tuple[Any, ...],
    *,
    dynamic: bool | None = False,
    grad: bool = False,
    options: dict[str, Any] | None = None,
    coordinate_descent: bool = False,
    alone: bool = False,
    more_inputs: tuple[tuple[Any, ...], ...] = (),
    mutates: bool = False,
    **compile_arguments: Any,
) -> Comparison:
    """Run `fn(*inputs)` eager, in float64, under Inductor with gatefuse and, if `alone`, without.

    options: gatefuse's. more_inputs: called afterwards with the same compiled function (dynamic
    shapes); their results are appended. mutates: `fn` writes to its inputs, so that every run gets
    copies of its own. compile_arguments go to torch.compile.
    """

    def own(args: tuple[Any, ...]) -> tuple[Any, ...]:
        return pytree.tree_map_only(Tensor, copy_of, args) if mutates else args

    calls = (inputs, *more_inputs)
    eager = [t for args in calls for t in _run(fn, fn, own(args), grad)]
    reference = [t for args in calls for t in _reference(fn, args, grad)]

    def compiled() -> list[Tensor]:
        run = torch.compile(fn, dynamic=dynamic, **compile_arguments)
        results: list[Tensor] = []
        for args in calls:
            # Copies: under CUDA graphs the next call overwrites what this one returned.
            results += [copy_of(t) for t in _run(run, fn, own(args), grad)]
        return results

    with emulate_coordinate_descent() if coordinate_descent else contextlib.nullcontext():
        torch._dynamo.reset()
        inductor = compiled() if alone else None
        torch._dynamo.reset()
        with gatefuse.fusing(**(options or {})) as report:
            fused = compiled()
    return Comparison(report, fused, eager, reference, inductor, grad)


def copy_of(t: Tensor) -> Tensor:
    """A copy with the very strides of `t`."""
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t)


def run_form(form: Form, device: str = "cpu", **arguments: Any) -> Comparison:
    """`compile_and_compare` of a row of the table; the emulation of coordinate descent is for the
    CPU."""
    return compile_and_compare(
        form.fn,
        form.inputs(device),
        more_inputs=tuple(form.inputs(device, lead=lead) for lead in form.more_leads),
        dynamic={"all": True, "rows": None, "": False}[form.dynamic],
        grad=form.grad,
        coordinate_descent=form.coordinate_descent and device == "cpu",
        **arguments,
    )


def report_of(fn: Callable[..., Any] = linear, **arguments: Any) -> gatefuse.Report:
    """Compile `fn` anew and check its result; the report of that compilation."""
    torch._dynamo.reset()
    inputs = make_inputs(fn)
    with gatefuse.record() as report, torch.no_grad():
        result = torch.compile(fn, **arguments)(*inputs)
        eager = fn(*inputs)
        judge("result", result, eager, fn(*(t.double() for t in inputs)))
    return report
