"""What the tests share: compile with and without gatefuse, judge against float64, capture graphs.

The one tolerance of the suite: with `ref` the float64 result,

    ||fused - ref||     <= 2 * ||eager - ref||     + eps(dtype) * ||ref||       (norm)
    max |fused - ref|   <= 2 * max |eager - ref|   + eps(dtype) * max |ref|     (worst element)

    eps(dtype) = ulp(dtype) + 4 * ulp(float32)

The first term is the rounding of the result: half an ulp may be lost, and eager, which sets the
bound, may have rounded luckily where fused did not. The second is float32 arithmetic on the way,
sums above all, which another order rounds otherwise. dtype is that of the result, or bfloat16 under
autocast, where a float32 result was rounded to bfloat16 on its way.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import torch._inductor.config as inductor_config
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch._decomp.decompositions import pw_cast_for_opmath
from torch._inductor import decomposition
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.fx_passes import pad_mm, post_grad
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._python_dispatch import TorchDispatchMode

import gatefuse
from gatefuse.backend import gatefuse_backend

if TYPE_CHECKING:
    from tests.support.forms import Form

LOW_PRECISION = (torch.float16, torch.bfloat16, torch.float32)
REPOSITORY = Path(__file__).resolve().parents[2]

INSTALLED = any(d.name == "gatefuse" for d in importlib.metadata.distributions())
#: By name where the entry point is registered; a plain checkout has the function.
BACKEND: Any = "gatefuse" if INSTALLED else gatefuse_backend

Run = Callable[..., Any]


# --- judging values ---------------------------------------------------------------------------


def judge(
    name: str,
    actual: Tensor,
    eager: Tensor,
    reference: Tensor,
    working_dtype: torch.dtype | None = None,
    strides: bool = True,
) -> None:
    """Assert the tolerance above, and that dtype, shape and strides are those of eager."""
    assert actual.dtype == eager.dtype, f"{name}: dtype {actual.dtype}, eager {eager.dtype}"
    assert actual.shape == eager.shape, f"{name}: shape {actual.shape}, eager {eager.shape}"
    assert not strides or actual.stride() == eager.stride(), f"{name}: strides {actual.stride()}"
    if actual.numel() == 0:
        return
    ref = reference.detach().double()
    error, allowed = actual.detach().double() - ref, eager.detach().double() - ref
    eps = torch.finfo(working_dtype or eager.dtype).eps + 4 * torch.finfo(torch.float32).eps
    for form, size in (("norm", torch.linalg.vector_norm), ("worst", lambda t: t.abs().max())):
        bound = 2 * size(allowed) + eps * size(ref)
        assert size(error) <= bound, (
            f"{name}: {form} error {size(error):.3e} > {bound:.3e} (eager {size(allowed):.3e})"
        )


def assert_identical(actual: list[Tensor], expected: list[Tensor]) -> None:
    """Bit for bit: values, signs of zero, NaN payloads, dtype, shape and strides."""
    assert len(actual) == len(expected)
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride()), f"output {i}"
        same = torch.equal(
            a.detach().contiguous().view(torch.uint8), b.detach().contiguous().view(torch.uint8)
        )
        assert same, f"output {i} differs by {(a.double() - b.double()).abs().max():.3e}"


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


# --- running ----------------------------------------------------------------------------------


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


# --- looking at graphs ------------------------------------------------------------------------


def op_nodes(graph: Graph | str | None) -> int:
    """How many gatefuse op calls a graph, or the readable text of one, holds."""
    assert graph is not None, "no graph text was recorded"
    if isinstance(graph, str):
        return len(re.findall(r"= torch\.ops\.gatefuse\.linear_sigmoid_mul\w*[.\w]*\(", graph))
    return sum("gatefuse" in str(node.target) for node in graph.nodes if node.op == "call_function")


def find(graph: Graph, target: Any) -> list[Node]:
    return graph.find_nodes(op="call_function", target=target)


class Capture(CustomGraphPass):
    """Keeps a copy of every post-grad graph that Inductor compiles, in `graphs`."""

    def __init__(self) -> None:
        self.graphs: list[Graph] = []

    def __call__(self, graph: Graph) -> None:
        copied = Graph()
        values: dict[Node, Node] = {}
        output = copied.graph_copy(graph, values)
        for old, new in values.items():
            new.meta = dict(old.meta)
        copied.output(output)
        self.graphs.append(copied)

    def uuid(self) -> None:
        return None  # never cached


@contextlib.contextmanager
def capture_post_grad() -> Iterator[list[Graph]]:
    """The post-grad graphs of what is compiled inside, as the fusion pass gets them."""
    capture = Capture()
    with inductor_config.patch(post_grad_custom_post_pass=capture):
        yield capture.graphs


def post_grad_graph(
    fn: Run, inputs: tuple[Any, ...], *, dynamic: bool = False, coordinate_descent: bool = False
) -> Graph:
    """The inference graph that Inductor makes of `fn(*inputs)`; compiles and runs it."""
    torch._dynamo.reset()
    with (
        capture_post_grad() as graphs,
        emulate_coordinate_descent() if coordinate_descent else contextlib.nullcontext(),
        torch.no_grad(),
    ):
        torch.compile(fn, dynamic=dynamic)(*inputs)
    assert len(graphs) == 1, f"{len(graphs)} graphs"
    return graphs[0]


# --- coordinate descent on the CPU ------------------------------------------------------------


@pw_cast_for_opmath
def _cuda_mm(self: Tensor, input2: Tensor, out_dtype: torch.dtype | None = None) -> Any:
    if statically_known_true(self.shape[0] == 1) or statically_known_true(input2.shape[1] == 1):
        return (self.unsqueeze(2) * input2.unsqueeze(0)).sum(dim=1)
    return NotImplemented


@pw_cast_for_opmath
def _cuda_bmm(self: Tensor, batch2: Tensor, out_dtype: torch.dtype | None = None) -> Any:
    if statically_known_true(self.shape[1] == 1) or statically_known_true(batch2.shape[2] == 1):
        return (self.unsqueeze(-1) * batch2.unsqueeze(1)).sum(dim=2)
    return NotImplemented


@contextlib.contextmanager
def emulate_coordinate_descent() -> Iterator[None]:
    """Inductor decomposes matrix-vector products as it does on CUDA under coordinate descent.

    Swaps the `mm` and `bmm` decompositions of torch/_inductor/decomposition.py, whose branch for
    `coordinate_descent_tuning` excludes the CPU, for that branch; `addmm` has no such branch there,
    and its CPU branch is switched off.
    """

    def keep(*args: Any, **kwargs: Any) -> Any:
        return NotImplemented

    swapped = {
        torch.ops.aten.mm.default: _cuda_mm,
        torch.ops.aten.bmm.default: _cuda_bmm,
        torch.ops.aten.addmm.default: keep,
    }
    table = decomposition.decompositions
    original = {op: table[op] for op in swapped}
    table.update(swapped)
    decomposition.fast_random_decomps.cache_clear()
    try:
        yield
    finally:
        table.update(original)
        decomposition.fast_random_decomps.cache_clear()


# --- padded products on the CPU ---------------------------------------------------------------


@contextlib.contextmanager
def pad_products() -> Iterator[None]:
    """Inductor pads every product whose sizes are no multiples of 8, as it does on CUDA where it
    measures that to be faster, and takes biases out of products."""
    cuda = dict.fromkeys(("check_device", "check_dtype", "has_triton"), lambda *_: True)
    with (
        mock.patch.multiple(pad_mm, **cuda),
        mock.patch.object(post_grad, "is_gpu", return_value=True),
        inductor_config.patch(shape_padding=True, force_shape_pad=True),
    ):
        yield


# --- rows of the table of forms ---------------------------------------------------------------

_LINEARS = r"torch\.ops\.aten\.(mm|addmm|mv|bmm|sum)\."


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


def check_report(form: Form, report: gatefuse.Report) -> None:
    """The numbers of sites that the form promises, in one forward graph, and a report that agrees
    with the graph's own text."""
    forward = [g for g in report.graphs if g.phase != "backward"]
    assert len(forward) == 1, [g.name for g in report.graphs]
    graph = forward[0]
    assert graph.phase == ("forward" if form.grad else "inference")
    assert graph.fused == len(graph.sites) == form.fused, [r.reason for r in graph.rejections]
    assert sum(s.has_addend for s in graph.sites) == form.addend
    assert sum(s.has_bias for s in graph.sites) == form.bias
    assert sum(s.keeps_logit for s in graph.sites) == form.keeps_logit
    for site in graph.sites:
        assert site.location is not None
        assert site.location.startswith("forms.py:")
    for rejection in report.rejections:
        assert rejection.reason

    assert op_nodes(graph.after) == form.fused
    assert op_nodes(graph.before) == 0
    assert graph.before is not None
    assert graph.after is not None
    # Each sigmoid is a site or a rejection, and of the linears only those of the sites are gone.
    assert graph.before.count("aten.sigmoid.") == form.fused + len(graph.rejections)
    if not form.keeps_logit:
        assert graph.after.count("aten.sigmoid.") == len(graph.rejections)
    linears = [len(re.findall(_LINEARS, text)) for text in (graph.before, graph.after)]
    assert linears[1] == linears[0] - form.fused

    backward = [g for g in report.graphs if g.phase == "backward"]
    assert len(backward) == int(form.grad)
    assert sum(g.fused for g in backward) >= form.backward


# --- other processes --------------------------------------------------------------------------


def run_python(
    code: str, *arguments: str, timeout: float = 300, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter with this repository importable; asserts that it exits 0.

    environment is added to this process's; an empty value removes the variable.
    """
    env = {k: v for k, v in (os.environ | environment).items() if v or k not in environment}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), env.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        env=env,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done
