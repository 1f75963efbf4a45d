"""Passes of others on the hooks that fail, delete nodes or return graphs: as without gatefuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor_config
from torch.fx import Graph

import gatefuse
from tests.routes.gates import make_expert, make_input
from tests.support.comparison import compile_and_compare
from tests.support.graphs import find
from tests.support.hooks import HOOK, PRE_HOOK, takes_lists

GraphPass = Callable[[Graph], Any]


def raises(graph: Graph) -> None:
    raise LookupError("a pass of the user's")


def takes_the_gate_out(graph: Graph) -> None:
    """`gate * value` becomes `value`; the nodes of the gate are deleted."""
    for sigmoid in find(graph, torch.ops.aten.sigmoid.default):
        for user in list(sigmoid.users):
            if user.target is torch.ops.aten.mul.Tensor and sigmoid.meta["val"].shape[-1] == 1:
                user.replace_all_uses_with(next(a for a in user.args if a is not sigmoid))
                graph.erase_node(user)
    graph.eliminate_dead_code()


def returns_another_graph(graph: Graph) -> Graph:
    """Inductor takes no notice of what a pass returns."""
    return Graph()


def returns_its_graph(graph: Graph) -> Graph:
    graph.eliminate_dead_code()
    return graph


@pytest.mark.parametrize("hook", [PRE_HOOK, HOOK])
@pytest.mark.parametrize(
    ("graph_pass", "fused"),
    [(takes_the_gate_out, 0), (returns_another_graph, 1), (returns_its_graph, 1)],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_passes_that_come_first(graph_pass: GraphPass, fused: int, hook: str) -> None:
    with inductor_config.patch({hook: graph_pass}):
        comparison = compile_and_compare(make_expert(), (make_input(),), alone=True)
    assert comparison.report.fused == fused
    assert comparison.report.graphs[0].error is None
    if fused:
        comparison.check()
    else:
        comparison.check_identical()


@pytest.mark.parametrize("hook", [PRE_HOOK, HOOK])
def test_a_pass_that_raises(hook: str) -> None:
    """Its error is the user's to see, and leaves nothing on the hooks."""
    with inductor_config.patch({hook: raises}):
        with (
            pytest.raises(Exception, match="a pass of the user's"),
            gatefuse.fusing(),
            torch.no_grad(),
        ):
            torch.compile(make_expert())(make_input())
        assert getattr(inductor_config, hook) is raises
    assert getattr(inductor_config, HOOK) is None


@pytest.mark.skipif(not takes_lists(), reason="this PyTorch's hooks take one pass")
def test_a_pass_that_deletes_the_fused_op() -> None:
    """A pass after gatefuse's sees an ordinary node, and may take it out."""

    def replaces_the_op(graph: Graph) -> None:
        op = torch.ops.gatefuse.linear_sigmoid_mul.default
        for node in find(graph, op):
            node.replace_all_uses_with(node.args[2])
            graph.erase_node(node)

    model, x = make_expert(), make_input()
    gatefuse.enable()
    hook = [getattr(inductor_config, HOOK), replaces_the_op]
    with torch.no_grad(), inductor_config.patch({HOOK: hook}), gatefuse.record() as report:
        result = torch.compile(model)(x)
        torch.testing.assert_close(result, model.down(torch.nn.functional.silu(model.up(x))))
    assert report.fused == 1
