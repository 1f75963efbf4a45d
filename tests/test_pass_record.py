"""What the pass keeps of a graph, for reports, dumps and caches; and what an error costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gatefuse
from gatefuse import recording
from gatefuse.inductor import fusion_pass
from gatefuse.inductor.fusion_pass import GateFusionPass
from gatefuse.inductor.rewriter import insert_call
from gatefuse.records import GraphReport
from tests.support.forms import linear, make_inputs
from tests.support.graphs import op_nodes, post_grad_graph

aten = torch.ops.aten


def near_miss(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """The sigmoid is added."""
    return torch.sigmoid(torch.nn.functional.linear(x, w)) + v


def without_sigmoid(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, w) * v


def seen(fn: Any) -> GraphReport:
    """What the pass notes of a function's graph."""
    with gatefuse.record() as report:
        GateFusionPass()(post_grad_graph(fn, make_inputs(linear)))
    (entry,) = report.graphs
    return entry


@pytest.mark.parametrize(
    ("fn", "gradients", "named"),
    [
        (linear, [], True),
        (near_miss, [], True),
        (without_sigmoid, ["of a gate whose forward is elsewhere"], True),
        (without_sigmoid, [], False),
    ],
)
def test_a_graph_of_which_there_is_something_to_say_has_a_name(
    fn: Any, gradients: list[str], named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By which its report is found when the graph comes from a cache."""
    monkeypatch.setattr(fusion_pass, "rewrite_gradients", lambda graph, options: gradients)
    entry = seen(fn)
    assert bool(entry.id) == named
    assert (entry.fused, bool(entry.rejections)) == (fn is linear, fn is near_miss)


def test_gradients_that_cannot_be_rewritten_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(fusion_pass, "rewrite_gradients", fail)
    graph = post_grad_graph(linear, make_inputs(linear))
    with gatefuse.record() as report:
        GateFusionPass()(graph)
    assert report.fused == op_nodes(graph) == 1


@pytest.mark.parametrize("dumped", [False, True])
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("fn", [linear, near_miss])
def test_code_is_kept_of_fused_gates_that_somebody_looks_at(
    fn: Any, recorded: bool, dumped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[GraphReport] = []
    monkeypatch.setattr(recording, "keep_code", kept.append)
    monkeypatch.setattr(recording, "recording", lambda: recorded)
    if dumped:
        monkeypatch.setenv("GATEFUSE_DUMP", str(tmp_path))
    GateFusionPass()(post_grad_graph(fn, make_inputs(linear)))
    assert len(kept) == (fn is linear and (recorded or dumped))


def test_who_asks_for_the_cache_key_is_watched_for_dumps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inductor asks for it before it looks into its cache: the last chance to see that graph."""
    monkeypatch.setenv("GATEFUSE_DUMP", str(tmp_path))
    monkeypatch.setattr(recording, "_dumper", None)
    monkeypatch.setattr(recording, "_open", [])
    GateFusionPass().uuid()
    assert recording._dumper in recording._open


def test_a_call_that_fails_leaves_no_node() -> None:
    graph = post_grad_graph(linear, make_inputs(linear))
    before = list(graph.nodes)
    (like,) = graph.find_nodes(op="call_function", target=aten.sigmoid.default)
    with graph.inserting_before(like), pytest.raises((RuntimeError, TypeError, ValueError)):
        insert_call(graph, like, aten.mm.default, like, like.args[0])
    assert list(graph.nodes) == before
