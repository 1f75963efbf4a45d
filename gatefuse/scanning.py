"""A scan: what gatefuse would do with a model, seen from its graphs. Nothing is computed.

Dynamo, AOTAutograd and Inductor's graph passes run on fake tensors, so a model needs no memory for
its weights; the compilation of each graph ends when gatefuse's pass has seen it, before any code is
generated.
"""

from __future__ import annotations

import contextlib
import inspect
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from gatefuse import alike_layers, compat, fakes, recording
from gatefuse.backend import options
from gatefuse.inductor.hooks import POST_HOOK, PRE_HOOK, passes_of
from gatefuse.inductor.moved_graph import MoveGraph, decompositions_for_gpu
from gatefuse.inductor.predicted_placement import predict
from gatefuse.inductor.rewriter import META_KEY
from gatefuse.model_gates import GateCounter
from gatefuse.report import FusionError, Report
from gatefuse.stored import graph_caches_off

__all__ = ["ScanError", "scan", "scan_call"]


class ScanError(RuntimeError):
    """A model that cannot be built, copied or traced on fake tensors. The message says which."""


def scan(
    model_or_builder: Callable[..., Any],
    /,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    device: str | torch.device | None = None,
    training: bool = False,
    dynamic: bool = False,
    expect: int = 0,
) -> Report:
    """Tell which gates of a model would be fused, as what, and why the others would not.

    Takes seconds for a model of any size: no weights, no code generation, no compiler, no GPU. The
    report is that of :func:`gatefuse.explain`, with the placements predicted.

    model_or_builder: a module, or a function of ``args`` and ``kwargs``, which stay as they are; or
        a builder, which is a callable that needs no arguments and returns the model, or
        ``(model, args)``, or ``(model, args, kwargs)``. A builder runs on fake tensors, so its
        model takes no memory.
    args, kwargs: arguments of one call, as for ``torch.export.export``; tensors on any device, the
        meta device included.
    device: what to compile for, such as ``"cuda"``; it need not exist. By default the device of the
        model's tensors; for a builder, or tensors on the meta device, the GPU if there is one.
    training: scan a training step, forward and backward, of the model in training mode; else an
        inference of the model in evaluation mode.
    dynamic: sizes of the arguments are symbolic.
    expect: raise :class:`gatefuse.FusionError` if fewer gates would be fused.

    Raises TypeError on wrong arguments, and :class:`gatefuse.ScanError` where the model cannot be
    built or traced.
    """
    if not callable(model_or_builder):
        raise TypeError(
            f"gatefuse: model_or_builder is of type {type(model_or_builder).__name__}; expected a "
            "module, a function, or a builder that returns one"
        )
    if isinstance(args, Tensor | str) or not isinstance(args, Sequence):
        raise TypeError(
            f"gatefuse: args is of type {type(args).__name__}; expected a tuple of the call's "
            "arguments, as in scan(model, (tokens,))"
        )
    report = scan_call(
        model_or_builder,
        tuple(args),
        dict(kwargs or {}),
        device=device,
        grad=training,
        train_mode=training,
        dynamic=dynamic,
    )
    gates = report.fused if report.model is None else len(report.model.fused)
    if gates < expect:
        raise FusionError(f"gatefuse: expected at least {expect} gates to fuse.\n{report}")
    return report


def scan_call(
    target: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    device: str | torch.device | None,
    grad: bool,
    train_mode: bool | None,
    dynamic: bool = False,
) -> Report:
    """:func:`scan` without its checks. train_mode: the mode that the model is put into, or None."""
    where = _device(device, target, args, kwargs)
    # The passes see the graphs of a device that is not here as graphs for it.
    traced_on = where if fakes.available(where.type) else torch.device("cpu")
    with _kept_state(), fakes.FakeMode() as mode:
        model, args, kwargs = _built(target, args, kwargs)
        model = _unwrapped(model)
        try:
            model = fakes.on_fakes(model, mode, traced_on)
            args, kwargs = fakes.on_fakes((args, kwargs), mode, traced_on)
        except Exception as e:
            raise ScanError(
                f"gatefuse: the model cannot be copied ({_short(e)}). Pass a builder, a function "
                "that returns the model"
            ) from e
        if isinstance(model, nn.Module) and train_mode is not None:
            model.train(train_mode)
        alike = alike_layers.shorten(model)
        tracer = _Tracer(where, grad=grad, dynamic=dynamic)
        try:
            report = tracer.trace(model, args, kwargs)
        except ScanError:
            if not alike or tracer.in_passes:
                raise
            for layers in alike:  # perhaps the model counts them
                layers.restore(model)
            alike = []
            report = tracer.trace(model, args, kwargs)
    report.activity.scanned = True
    if report.model is not None:
        for layers in alike:
            report.model = layers.count_all(report.graphs, report.model)
        notes = [layers.note for layers in alike]
        if where != traced_on:
            notes.append(f"predicted for {where.type}, which is not here, from a trace on the CPU")
        report.model.note = "; ".join(notes)
    return report


def _device(given: str | torch.device | None, target: Any, args: Any, kwargs: Any) -> torch.device:
    """The device to compile for; TypeError or ValueError on one that cannot be."""
    if given is None:
        tensors: Iterator[Any] = iter(pytree.tree_leaves((args, kwargs)))
        if isinstance(target, nn.Module):
            tensors = iter((*target.parameters(), *target.buffers(), *tensors))
        found = (t.device for t in tensors if isinstance(t, Tensor) and not t.is_meta)
        given = next(found, torch.device("cuda" if fakes.available("cuda") else "cpu"))
    try:
        device = torch.device(given)
    except RuntimeError:
        raise ValueError(f"gatefuse: no device {given!r}; expected cpu or cuda") from None
    if device.type != "cuda" and not fakes.available(device.type):
        raise ValueError(f"gatefuse: this machine has no {device.type}; expected cpu or cuda")
    if device.type == "cpu":
        return torch.device("cpu")
    return torch.device(device.type, device.index or 0)


@contextlib.contextmanager
def _kept_state() -> Iterator[None]:
    """What a builder or the tracing changes for the whole process is put back."""
    dtype, deterministic = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
    random = torch.get_rng_state()
    try:
        with (
            torch.set_grad_enabled(torch.is_grad_enabled()),
            warnings.catch_warnings(),
            graph_caches_off(),
            config.patch(shape_padding=False),
            functorch_config.patch(force_non_lazy_backward_lowering=True),
        ):
            # About speed, of PyTorch's and of the model's.
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.use_deterministic_algorithms(deterministic)
        torch.set_rng_state(random)


def _built(
    target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """The model and the arguments of its call; a builder is called."""
    if isinstance(target, nn.Module) or not _needs_no_arguments(target):
        return target, args, kwargs
    try:
        result = target()
    except ScanError:
        raise
    except Exception as e:
        raise ScanError(f"gatefuse: the model cannot be built: {_short(e)}") from e
    model, *inputs = result if isinstance(result, tuple) else (result,)
    if not callable(model) or len(inputs) > 2:
        raise ScanError(
            f"gatefuse: the builder returned {_described(result)}; expected a model, (model, args) "
            "or (model, args, kwargs)"
        )
    if inputs:
        args = tuple(inputs[0]) if isinstance(inputs[0], tuple | list) else (inputs[0],)
    if len(inputs) == 2:
        kwargs = inputs[1]
    return model, args, dict(kwargs)


def _needs_no_arguments(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind()
    except (TypeError, ValueError):
        return False
    return True


def _described(value: Any) -> str:
    if isinstance(value, tuple):
        return f"a tuple of {', '.join(type(v).__name__ for v in value)}"
    return f"a value of type {type(value).__name__}"


def _unwrapped(model: Any) -> Any:
    """The model that ``torch.compile`` was called with; a function with code of its own, to which
    Dynamo ties what it compiles."""
    model = getattr(model, "_orig_mod", model)
    model = inspect.unwrap(model, stop=lambda f: not hasattr(f, "_torchdynamo_orig_callable"))
    model = getattr(model, "_torchdynamo_orig_callable", model)
    if isinstance(model, types.FunctionType):
        copied = types.FunctionType(
            model.__code__.replace(),
            model.__globals__,
            model.__name__,
            model.__defaults__,
            model.__closure__,
        )
        copied.__kwdefaults__ = model.__kwdefaults__
        return copied
    return model


@dataclass
class _Tracer:
    """Runs a model on fakes, with each of its graphs shown to the pass."""

    device: torch.device
    grad: bool
    dynamic: bool
    in_passes: bool = False
    """Whether an error is of the passes, not of the model."""

    def trace(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Report:
        """The report of one call; ScanError where it fails."""
        counter = GateCounter(model)

        def backend(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
            counter.see(gm)
            self.in_passes = True
            compiled = self._compile(gm, example_inputs)
            self.in_passes = False
            return compiled

        if isinstance(model, nn.Module):
            model._compiled_call_impl = None  # of model.compile()
        try:
            with (
                recording.record(alone=True) as report,
                torch.set_grad_enabled(self.grad),
                torch._dynamo.config.patch(recompile_limit=64),
            ):
                torch.compile(model, backend=backend, dynamic=self.dynamic or None)(*args, **kwargs)
        except Exception as e:
            raise ScanError(f"gatefuse: the model cannot be traced: {_short(e)}") from e
        report.model = counter.result(report.graphs)
        return report

    def _compile(self, gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx

        patches = options()
        patches[POST_HOOK] = _StopAfter(patches.get(POST_HOOK, getattr(config, POST_HOOK)))
        decompositions = None
        if not fakes.available(self.device.type):
            before = patches.get(PRE_HOOK, getattr(config, PRE_HOOK))
            patches[PRE_HOOK] = MoveGraph(self.device, before)
            decompositions = decompositions_for_gpu()
        compiled: Any = compile_fx(
            gm,
            example_inputs,
            inner_compile=self._look,
            config_patches=patches,
            decompositions=decompositions,
        )
        return compiled

    def _look(self, gm: GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
        """In the place of Inductor's ``compile_fx_inner``: the graph passes of it, and then a
        function that returns fakes of the graph's sizes."""
        from torch._inductor.compile_fx import compile_fx_inner

        (output,) = gm.graph.find_nodes(op="output")
        results = [n.meta.get("val") if isinstance(n, Node) else n for n in output.args[0]]
        with contextlib.suppress(_Seen):
            compile_fx_inner(gm, example_inputs, **kwargs)

        def call(inputs: list[Any]) -> list[Any]:
            inputs.clear()
            return [_like(value) for value in results]

        call._boxed_call = True  # type: ignore[attr-defined]
        return call


class _Seen(BaseException):
    """The pass has seen the graph."""


class _StopAfter(CustomGraphPass):
    """Runs the passes of a hook, notes what would become of each gate, and ends the compilation."""

    def __init__(self, before: Any) -> None:
        self._before = passes_of(before)

    def __call__(self, graph: Graph) -> None:
        """Raises _Seen at the graph itself; its subgraphs come first."""
        for graph_pass in self._before:
            graph_pass(graph)
        for node in graph.nodes:
            if META_KEY in node.meta:
                placement, reason = predict(node)
                recording.note_placement(node.meta[META_KEY]["key"], placement, reason)
        if compat.graph_phase() != "subgraph":
            raise _Seen

    def uuid(self) -> None:
        """No caching."""


def _like(value: Any) -> Any:
    """A fake of the same sizes in the mode around the call."""
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return _number(value)
    if not isinstance(value, Tensor):
        return value
    size, stride = ([_number(n) for n in numbers] for numbers in (value.size(), value.stride()))
    return torch.empty_strided(size, stride, dtype=value.dtype, device=value.device)


def _number(size: Any) -> Any:
    node = getattr(size, "node", None)
    if node is None:
        return size
    return node.hint if node.has_hint() else 2  # the number of elements that are found


def _short(error: BaseException) -> str:
    """An error's type and first line."""
    inner = getattr(error, "inner_exception", None) or error
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()]
    return f"{type(inner).__name__}: {lines[0]}" if lines else type(inner).__name__
