"""What the pass decides around finding and rewriting: when it runs, what it keeps, when it fails.

Graphs as ``make_fx`` traces them, given to the pass alone.
"""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule

import gatefuse
from gatefuse import compat, recording
from gatefuse.inductor import lowering, rewriter
from gatefuse.inductor.fusion_pass import GateFusionPass
from gatefuse.inductor.rewriter import DifferentResult, Rewriter
from tests.support.graphs import op_nodes, traced
from tests.support.guards import gate


def gated(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return gate(x, w) * v


def gated_and_added(x: Tensor, w: Tensor, v: Tensor, r: Tensor) -> Tensor:
    return r + gate(x, w) * v


def one_gate(fn: Any = gated) -> Graph:
    return traced(fn, torch.randn(6, 16), torch.randn(1, 16))


def no_gate() -> Graph:
    return traced(lambda x: -x, torch.randn(6, 16))


def run(graph: Graph, **options: Any) -> gatefuse.Report:
    with gatefuse.record() as report:
        GateFusionPass(gatefuse.Options(**options))(graph)
    return report


def test_what_was_given() -> None:
    assert GateFusionPass().given == {}
    assert GateFusionPass(gatefuse.Options(expect=1)).given == {"expect": 1}
    explicit = GateFusionPass(gatefuse.Options(expect=1), given={"placement": "auto"})
    assert explicit.given == {"placement": "auto"}


def test_equal_with_equal_options() -> None:
    assert GateFusionPass() == GateFusionPass(gatefuse.Options())
    assert GateFusionPass() != GateFusionPass(gatefuse.Options(expect=1))
    assert GateFusionPass() != gatefuse.Options()


@pytest.fixture(params=["environment", "version", "inductor"])
def off(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Something for which nothing is fused."""
    monkeypatch.setattr(compat, "_warned", set())
    if request.param == "environment":
        monkeypatch.setenv("GATEFUSE_DISABLE", "1")
    elif request.param == "version":
        monkeypatch.setattr(compat, "_torch_version", lambda: (2, 99))
    else:
        monkeypatch.setattr(lowering, "register", lambda: {}["gone"])
    return str(request.param)


def test_nothing_is_fused(off: str) -> None:
    graph = one_gate()
    silent = off == "environment"
    with warnings.catch_warnings() if silent else pytest.warns(UserWarning, match="unfused"):
        warnings.simplefilter("error" if silent else "always")
        assert run(graph).graphs == []
    assert op_nodes(graph) == 0


def test_uuid_tells_whether_anything_is_fused(monkeypatch: pytest.MonkeyPatch, off: str) -> None:
    found = GateFusionPass().uuid()
    monkeypatch.undo()
    assert (found != GateFusionPass().uuid()) == (off != "inductor")


@pytest.mark.parametrize("who", ["dump", "record", "log", "nobody"])
def test_text_is_made_for_whoever_looks_at_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, who: str
) -> None:
    shown: list[str] = []
    monkeypatch.setattr(recording, "readable", lambda graph, name: shown.append(name) or name)
    monkeypatch.setattr(recording, "graphs_wanted", lambda: who == "log")
    monkeypatch.setattr(recording, "recording", lambda: who == "record")
    if who == "dump":
        monkeypatch.setenv("GATEFUSE_DUMP", str(tmp_path))
    GateFusionPass()(no_gate())
    assert shown == []
    GateFusionPass()(one_gate())
    assert [name.split()[1] for name in shown] == ["before", "after"] * (who != "nobody")
    assert len(list(tmp_path.glob("*/*before*"))) == (who == "dump")


def test_a_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("GATEFUSE_DUMP", str(tmp_path / "file"))
    assert run(one_gate()).fused == 1


@pytest.mark.parametrize("phase", ["inference", "forward", "backward"])
@pytest.mark.parametrize("expect", [0, 1, 2])
def test_expect(monkeypatch: pytest.MonkeyPatch, expect: int, phase: str) -> None:
    monkeypatch.setattr(compat, "graph_phase", lambda: phase)
    fails = expect == 2 and phase != "backward"
    with pytest.raises(gatefuse.FusionError) if fails else contextlib.nullcontext():
        run(one_gate(), expect=expect)


@pytest.mark.parametrize("expect", [1, 2])
def test_expect_counts_in_bodies(expect: int) -> None:
    """A graph's constants are no bodies."""
    body = GraphModule(torch.nn.Module(), one_gate())
    run(body.graph)
    module = GraphModule(torch.nn.Module(), no_gate())
    module.body = body
    module.register_buffer("constant", torch.ones(1))
    with module.graph.inserting_before(module.graph.output_node()):
        for name in ("body", "constant"):
            module.graph.get_attr(name)
    with pytest.raises(gatefuse.FusionError) if expect == 2 else contextlib.nullcontext():
        run(module.graph, expect=expect)


@pytest.mark.parametrize("fn", [gated, gated_and_added])
@pytest.mark.parametrize("error", [DifferentResult("other strides"), RuntimeError("broken")])
def test_a_site_that_cannot_be_rewritten(
    monkeypatch: pytest.MonkeyPatch, error: Exception, fn: Any
) -> None:
    """One with an addend is tried again without it where the result would be another."""
    tried = []
    rewrite = Rewriter.rewrite

    def rewriting(self: Rewriter, site: Any, key: str) -> Any:
        tried.append(site.addend is not None)
        return rewrite(self, site, key)

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(Rewriter, "rewrite", rewriting)
    monkeypatch.setattr(rewriter, "check_same", fail)
    graph = one_gate(fn)
    before = str(graph)
    report = run(graph)
    different = isinstance(error, DifferentResult)
    reason = "other strides" if different else "could not be rewritten: RuntimeError: broken"
    assert [r.reason for r in report.rejections] == [reason]
    assert tried == ([False] if fn is gated else [True, False] if different else [True])
    assert str(graph) == before


def test_an_error_at_the_end_undoes_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("broken")

    graph = one_gate()
    before = str(graph)
    with monkeypatch.context() as patch:
        patch.setattr(Graph, "lint", fail)
        (entry,) = run(graph).graphs
    assert (entry.error, entry.fused, entry.sites) == ("RuntimeError: broken", 0, [])
    assert str(graph) == before
