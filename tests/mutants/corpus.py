"""The graphs that the test suite gives to the pass: recorded once, replayed for every mutant."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._inductor import config
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

import gatefuse
from gatefuse import compat, recording
from gatefuse.inductor import fusion_pass, match_gate
from gatefuse.inductor.choices import GRADIENT_KEY
from gatefuse.inductor.rewriter import META_KEY
from tests.support.gradients import are_rewritten, rewritten_gradients

__all__ = ["Corpus", "Outcome", "interpreted", "record", "replay"]

_SETTINGS = (
    "batch_invariant",
    "deterministic",
    "emulate_precision_casts",
    "coordinate_descent_tuning",
    "max_autotune",
    "max_autotune_gemm",
    "pre_grad_fusion_options",
    "post_grad_fusion_options",
)
"""Inductor's, that the matcher and the pass look at."""

_LARGEST = 400
"""Nodes; the tests of the matcher's speed have larger graphs, and are run themselves."""


@dataclass
class Entry:
    """A graph as the pass got it, its options, and what the pass made of it without a mutant."""

    graph: GraphModule
    options: gatefuse.Options
    phase: str
    settings: dict[str, Any]
    rewrites: bool
    """Gradients are rewritten as on a GPU."""
    expected: Outcome = field(init=False)
    functions: set[str] = field(default_factory=set)
    """Those that the pass calls, by the path of their names."""


class Outcome:
    """What the pass did to a graph.

    said: the sites with what is known of each, the rejections with their reasons, the error. text:
    the graph afterwards, with the metadata of its nodes.
    """

    def __init__(self, said: tuple[Any, ...], module: GraphModule) -> None:
        self.said = said
        self.text = (str(module.graph), *(_described(n) for n in module.graph.nodes))
        self._module = module

    @functools.cached_property
    def results(self) -> list[Tensor] | None:
        """Outputs and then inputs of the graph when it has run, or None where it cannot run."""
        return _run(self._module)

    def problem(self, expected: Outcome) -> str | None:
        """How this differs from what the pass without a mutant does, or None."""
        if self.said != expected.said:
            return "the report differs"
        if self.text == expected.text:
            return None
        if self.results is None or expected.results is None:
            return None if self.results is expected.results else "the graph does not run"
        for a, b in zip(self.results, expected.results, strict=True):
            if (a.dtype, a.shape, a.stride()) != (b.dtype, b.shape, b.stride()):
                return "dtype, shape or strides of a result differ"
            if a.is_floating_point() and a.numel():
                # Both round alike but for the order of sums.
                eps = torch.finfo(a.dtype).eps + 4 * torch.finfo(torch.float32).eps
                a, b = a.double().nan_to_num(nan=1e9), b.double().nan_to_num(nan=1e9)
                if (a - b).abs().max() > 2 * eps * b.abs().max():
                    return "a result differs"
            elif not torch.equal(a, b):
                return "a result differs"
        return None


@dataclass
class Corpus:
    """passed: the tests that pass under :func:`interpreted`, as pytest names them, each with the
    functions that it calls if it is one of those to run again."""

    entries: list[Entry] = field(default_factory=list)
    passed: dict[str, set[str]] = field(default_factory=dict)
    _seen: set[tuple[Any, ...]] = field(default_factory=set)

    def add(self, graph: Graph, options: gatefuse.Options, phase: str) -> None:
        if len(graph.nodes) > _LARGEST:
            return
        settings = {n: getattr(config, n) for n in _SETTINGS if hasattr(config, n)}
        try:
            vals = map(_described, graph.nodes)
            rewrites = are_rewritten()
            key = (str(graph), *vals, repr(options), phase, str(settings), rewrites)
            copied = _copied(graph)
        except Exception:  # no text can be made of it: a function has no name, or no arguments
            return
        if key not in self._seen:
            self._seen.add(key)
            self.entries.append(Entry(copied, options, phase, settings, rewrites))


def _described(node: Node) -> str:
    val = node.meta.get("val")
    if isinstance(val, Tensor):
        return f"{val.dtype} {val.shape} {val.stride()} {val.device}"
    return str(val)


def _copied(graph: Graph) -> GraphModule:
    copied = Graph()
    values: dict[Any, Any] = {}
    output = copied.graph_copy(graph, values)
    for old, new in values.items():
        new.meta = dict(old.meta)
    copied.output(output)
    return GraphModule(graph.owning_module or torch.nn.Module(), copied)


# --- recording ----------------------------------------------------------------------------------


def _inner_compile(module: GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
    """What Inductor does to a graph before it generates code; then ATen runs the graph."""
    from torch._inductor.compile_fx import _recursive_post_grad_passes, fake_tensor_prop
    from torch._inductor.fx_passes.post_grad import view_to_reshape
    from torch._inductor.virtualized import V

    view_to_reshape(module)
    with torch.no_grad():
        fake_mode = fake_tensor_prop(module, inputs)
    with V.set_fake_mode(fake_mode):
        _recursive_post_grad_passes(module, kwargs.get("is_inference", False))
    module.recompile()

    def run(args: list[Any]) -> Any:
        return module(*args)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def _interpreted_backend(module: GraphModule, inputs: list[Any]) -> Any:
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(module, inputs, inner_compile=_inner_compile)


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """torch.compile makes graphs as Inductor does, the passes on its hooks included, and ATen runs
    them: no code is generated. A compile that names a backend or options is not changed."""
    compile_ = torch.compile

    def quick(model: Any = None, **arguments: Any) -> Any:
        if arguments.keys() <= {"dynamic", "fullgraph"}:
            arguments["backend"] = _interpreted_backend
        return compile_(model, **arguments)

    with mock.patch.object(torch, "compile", quick):
        yield


class _Passed:
    """A plugin of pytest's that notes which tests pass, and what some of them call."""

    def __init__(self, corpus: Corpus, run_again: tuple[str, ...]) -> None:
        self.corpus = corpus
        self.run_again = run_again
        self.called: dict[str, set[str]] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, None, None]:
        if not item.nodeid.startswith(self.run_again):
            return (yield)
        with _called_functions() as self.called[item.nodeid]:
            return (yield)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self.corpus.passed[report.nodeid] = self.called.get(report.nodeid, set())


@contextlib.contextmanager
def _called_functions() -> Iterator[set[str]]:
    """The functions that are called inside, by the paths of their names."""
    called: set[str] = set()
    sys.setprofile(lambda frame, event, argument: called.add(frame.f_code.co_qualname))
    try:
        yield called
    finally:
        sys.setprofile(None)


def record(files: Sequence[str], run_again: tuple[str, ...] = ()) -> Corpus:
    """Run test files, code generation left out; keep every graph that the pass or the matcher is
    given.

    run_again: how the names of those tests begin of which is noted what they call.
    """
    corpus = Corpus()
    call, find = fusion_pass.GateFusionPass.__call__, match_gate.find_sites

    def recording_call(self: fusion_pass.GateFusionPass, graph: Graph) -> None:
        corpus.add(graph, self.options, compat.graph_phase())
        call(self, graph)

    def recording_find(graph: Graph) -> Any:
        corpus.add(graph, gatefuse.Options(), "inference")
        return find(graph)

    with (
        mock.patch.object(fusion_pass.GateFusionPass, "__call__", recording_call),
        mock.patch.object(match_gate, "find_sites", recording_find),
        interpreted(),
    ):
        arguments = [*files, "-q", "-p", "no:cacheprovider", "--tb=no", "--show-capture=no"]
        pytest.main(arguments, plugins=[_Passed(corpus, run_again)])
    corpus.entries.sort(key=lambda entry: len(entry.graph.graph.nodes))
    for entry in corpus.entries:
        with _called_functions() as entry.functions:
            entry.expected = replay(entry)
    return corpus


# --- replaying ----------------------------------------------------------------------------------


def replay(entry: Entry) -> Outcome:
    """Run the pass on a copy of the graph, and then the graph."""
    module = _copied(entry.graph.graph)
    options = gatefuse.Options(**{**vars(entry.options), "expect": 0})
    with (
        mock.patch.object(compat, "graph_phase", return_value=entry.phase),
        mock.patch.object(recording, "readable", return_value=""),
        config.patch(entry.settings),
        rewritten_gradients(entry.rewrites),
        gatefuse.record() as recorded,
    ):
        fusion_pass.GateFusionPass(options)(module.graph)
    module.graph.lint()
    (graph,) = recorded.graphs
    sites = [
        (s.location, s.rows, s.H, s.D, s.dtype, s.has_bias, s.has_addend, s.keeps_logit)
        for s in graph.sites
    ]
    marks = [
        (mark["placement"], mark["eager_rounding"], mark["batch_invariant"])
        + ((str(mark["roundings"]),) if mark["eager_rounding"] else ())
        for n in module.graph.nodes
        if (mark := n.meta.get(META_KEY))
    ]
    marks += [(n.name,) for n in module.graph.nodes if n.meta.get(GRADIENT_KEY)]
    rejections = [(r.node, r.location, r.reason, r.kind) for r in graph.rejections]
    told = (sites, marks, rejections, graph.gradients, graph.error)
    said = (graph.fused, *told, len(module.graph.nodes))
    return Outcome(said, module)


def _run(module: GraphModule) -> list[Tensor] | None:
    torch.manual_seed(0)
    try:
        inputs = [_input(n.meta["val"]) for n in module.graph.find_nodes(op="placeholder")]
        module.recompile()
        with torch.no_grad():
            outputs = module(*inputs)
    except Exception:
        return None
    found = [t for t in pytree.tree_leaves((outputs, inputs)) if isinstance(t, Tensor)]
    return [t.detach().clone() if t.is_contiguous() else t.detach() for t in found]


def _input(val: Any) -> Any:
    """A value like that of a placeholder, sizes that are symbolic as in the compile."""
    if not isinstance(val, Tensor):
        return int(val.node.hint) if isinstance(val, torch.SymInt) else val
    if val.device.type != "cpu":
        raise NotImplementedError(f"inputs on {val.device}")
    shape, stride = (tuple(map(int, map(_hint, sizes))) for sizes in (val.shape, val.stride()))
    made = torch.empty_strided(shape, stride, dtype=val.dtype)
    make: Callable[..., Any] = made.normal_ if made.is_floating_point() else made.zero_
    if made.numel():
        make()
    return made


def _hint(size: Any) -> int:
    return size.node.hint if isinstance(size, torch.SymInt) else size
