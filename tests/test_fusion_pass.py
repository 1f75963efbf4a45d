"""The pass breaks no compilation: on an error the graph is as it was, and the report says so.

Its `uuid`, part of the key of Inductor's caches, changes with whatever changes its code.
"""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor import pattern_matcher
from torch.fx import Graph

import gatefuse
from gatefuse import recording
from gatefuse.inductor import cost_model, fusion_pass, node_order, rewriter
from gatefuse.inductor.fusion_pass import GateFusionPass
from tests.support.comparison import compile_and_compare
from tests.support.forms import (
    addend_bias,
    linear,
    logit_returned,
    make_inputs,
    shared_gate,
    sum_of_two_gates,
    two_layers,
)
from tests.support.graphs import op_nodes, post_grad_graph
from tests.support.programs import REPOSITORY, run_python


def logit_read_before_the_gate(x: torch.Tensor, w: torch.Tensor, v: torch.Tensor) -> Any:
    """Its first reader moves to after the op, past what makes the value."""
    z = torch.nn.functional.linear(x, w)
    return torch.tanh(z), torch.sigmoid(z) * torch.relu(v)


#: Steps that fail, and forms in which they happen: only a graph that needs a logit is sorted.
BROKEN = [
    *(("lint", fn) for fn in (addend_bias, logit_returned, sum_of_two_gates, two_layers)),
    *(("sort", fn) for fn in (logit_returned, shared_gate, logit_read_before_the_gate)),
]


def describe(graph: Graph) -> list[tuple[Any, ...]]:
    return [
        (n, n.name, n.args, n.kwargs, set(n.users), {k: id(v) for k, v in n.meta.items()})
        for n in graph.nodes
    ]


def fail(*_: Any, **__: Any) -> None:
    raise RuntimeError("broken")


@pytest.mark.parametrize(("broken", "fn"), BROKEN)
def test_a_failed_rewrite_is_undone(monkeypatch: pytest.MonkeyPatch, broken: str, fn: Any) -> None:
    graph = post_grad_graph(fn, make_inputs(fn))
    before = describe(graph)
    sort = pattern_matcher.stable_topological_sort

    def sort_and_fail(graph: Graph) -> None:
        sort(graph)
        fail()

    with monkeypatch.context() as patch, gatefuse.record() as report:
        if broken == "sort":
            patch.setattr(pattern_matcher, "stable_topological_sort", sort_and_fail)
        else:
            patch.setattr(Graph, "lint", fail)
        GateFusionPass()(graph)
    assert describe(graph) == before
    assert report.fused == 0
    assert not report.sites
    assert report.graphs[0].error == "RuntimeError: broken"
    graph.lint()
    GateFusionPass()(graph)
    assert op_nodes(graph) > 0


def test_a_graph_without_gates_is_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = post_grad_graph(torch.tanh, (torch.randn(4),))
    monkeypatch.setattr(Graph, "lint", fail)
    with gatefuse.record() as report:
        GateFusionPass()(graph)
    assert report.graphs[0].error is None


def test_ops_that_wait_for_each_other_are_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if the matcher overlooked a cycle."""
    from tests.test_negatives import Negative, values_from_each_others_logits

    monkeypatch.setattr(node_order.KeptLogits, "add", lambda self, logit, anchor, operands: None)
    fn = values_from_each_others_logits
    result = compile_and_compare(fn, Negative("", fn).inputs(), alone=True)
    result.check_identical()
    assert result.report.fused == 0
    assert "left unfused after an error" in str(result.report)


@pytest.mark.parametrize("broken", ["matcher", "op", "text"])
def test_errors_leave_the_model_unfused_or_unseen(
    monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    where, name = {
        "matcher": (fusion_pass, "find_sites"),
        "op": (rewriter, "check_same"),
        "text": (torch.fx.GraphModule, "print_readable"),
    }[broken]
    graph = post_grad_graph(linear, make_inputs(linear))
    before = describe(graph)
    with monkeypatch.context() as patch, gatefuse.record() as report:
        patch.setattr(where, name, fail)
        GateFusionPass()(graph)
    (entry,) = report.graphs
    if broken == "text":
        assert (entry.fused, entry.before, entry.after) == (1, None, None)
        return
    assert describe(graph) == before
    assert entry.fused == 0
    assert "broken" in str(report)


def test_a_graph_keeps_its_module() -> None:
    """Later passes find their sub-modules and constants by the graph's module."""
    graph = post_grad_graph(linear, make_inputs(linear))
    module = torch.fx.GraphModule(torch.nn.Module(), graph)
    with gatefuse.record() as report:
        GateFusionPass()(module.graph)
    assert report.graphs[0].before is not None
    assert module.graph.owning_module is module


def test_a_dump_that_cannot_be_written_breaks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("GATEFUSE_DUMP", str(file))
    with gatefuse.fusing() as report, torch.no_grad():
        torch.compile(linear)(*make_inputs(linear))
    assert report.fused == 1


def test_no_text_is_made_of_graphs_that_nobody_looks_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take most of the pass's time."""
    shown = []
    monkeypatch.setattr(recording, "readable", lambda graph, name: shown.append(name))
    GateFusionPass()(post_grad_graph(linear, make_inputs(linear)))
    assert shown == []
    with gatefuse.record():
        GateFusionPass()(post_grad_graph(linear, make_inputs(linear)))
    assert len(shown) == 2


@pytest.mark.parametrize("placement", ["auto", "inline"])
@pytest.mark.parametrize("rows", [15, 16])
def test_large_results_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, rows: int, placement: Any
) -> None:
    """Behind a kernel of Inductor's they are left alone, unless a placement is forced; a gate on
    inputs of the graph is fused at any size."""
    monkeypatch.setitem(cost_model.LARGE_RESULT, 4, 16 * 64 * 4)
    options = gatefuse.Options(placement=placement)
    for fn, fused in ((linear, True), (computed_input, rows < 16 or placement == "inline")):
        graph = post_grad_graph(fn, make_inputs(fn, lead=(rows,)))
        with gatefuse.record() as report:
            GateFusionPass(options)(graph)
        assert report.fused == fused
        assert [("size on the CPU" in r.reason) for r in report.rejections] == [True] * (not fused)


def computed_input(x: torch.Tensor, w: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return linear(torch.tanh(x), w, v)


def test_pass_is_picklable() -> None:
    graph_pass = GateFusionPass(gatefuse.Options(placement="inline", expect=2))
    copy = pickle.loads(pickle.dumps(graph_pass))
    assert copy == graph_pass
    assert copy.uuid() == graph_pass.uuid()


def test_uuid_changes_with_options() -> None:
    options = [
        {},
        {"placement": "inline"},
        {"placement": "kernel"},
        {"eager_rounding": True},
        {"expect": 1},
    ]
    assert len({GateFusionPass(gatefuse.Options(**o)).uuid() for o in options}) == len(options)


def test_uuid_changes_with_the_source(tmp_path: Path) -> None:
    """One comment more in any module that decides what code is generated changes the uuid."""
    shutil.copytree(REPOSITORY / "gatefuse", tmp_path / "gatefuse")
    done = run_python(
        """
        import pathlib, sys
        sys.path.insert(0, sys.argv[1])
        from gatefuse.inductor import fusion_pass
        inductor = pathlib.Path(fusion_pass.__file__).parent
        assert inductor.is_relative_to(sys.argv[1])
        uuid = fusion_pass.GateFusionPass().uuid()
        for path in [*inductor.glob("*.py"), *inductor.parent.glob("*.py")]:
            source = path.read_text()
            path.write_text(source + "# changed\\n")
            fusion_pass.sources_hash.cache_clear()
            if fusion_pass.GateFusionPass().uuid() == uuid:
                print(path.stem)
            path.write_text(source)
        """,
        str(tmp_path),
    )
    assert not done.stdout


@pytest.mark.timeout(120)
def test_a_chain_of_gates_compiles_in_linear_time() -> None:
    """Input, value and addend of each are the one before's result: none is computed twice."""

    def chain(x: Tensor, weights: Tensor) -> Tensor:
        for w in weights.unbind(0):
            x = x + torch.sigmoid(torch.nn.functional.linear(x, w)) * x
        return x

    weights = torch.randn(24, 1, 64) / 64
    compiled = compile_and_compare(chain, (torch.randn(5, 64), weights))
    assert compiled.report.fused == 24
    compiled.check()
