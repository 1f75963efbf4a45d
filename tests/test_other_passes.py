"""Passes of others on Inductor's hooks: they stay, and stay in order."""

from __future__ import annotations

import pickle

import pytest
import torch
import torch._inductor.config as inductor_config
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph

import gatefuse
from gatefuse.inductor import hooks
from gatefuse.inductor.fusion_pass import GateFusionPass
from tests.support.comparison import report_of
from tests.support.forms import addend_first
from tests.support.graphs import find
from tests.support.hooks import HOOK, PRE_HOOK, Watcher, takes_lists


@pytest.mark.parametrize("as_list", [False, True], ids=["single", "list"])
def test_other_passes_keep_running_in_order(as_list: bool) -> None:
    if as_list and not takes_lists():
        pytest.skip("this PyTorch's hooks hold one pass")
    log: list[tuple[str, int]] = []
    first, second, pre = (Watcher(name, log) for name in ("first", "second", "pre"))
    hook = [first, second] if as_list else first
    expected = ["first", "second"] if as_list else ["first"]

    with inductor_config.patch({HOOK: hook, PRE_HOOK: pre}):
        gatefuse.enable()
        assert report_of().fused == 1
        assert log == [(name, 0) for name in ["pre", *expected]]
        gatefuse.disable()
        assert hooks.passes_of(getattr(inductor_config, HOOK)) == hooks.passes_of(hook)
        assert getattr(inductor_config, PRE_HOOK) is pre
        log.clear()
        assert report_of().fused == 0
        assert [name for name, _ in log] == ["pre", *expected]


def test_a_plain_function_on_the_hook_keeps_running() -> None:
    seen: list[int] = []

    def mine(graph: Graph) -> None:
        seen.append(len(find(graph, torch.ops.aten.sigmoid.default)))

    with inductor_config.patch({HOOK: mine}), gatefuse.fusing():
        assert report_of().fused == 1
    assert seen == [1]


def test_a_pass_that_leaves_the_graph_out_of_order() -> None:
    """Inductor sorts when all passes have run."""

    def mine(graph: Graph) -> None:
        (add,) = find(graph, torch.ops.aten.add.Tensor)
        (neg,) = find(graph, torch.ops.aten.neg.default)
        add.prepend(neg)

    def fn(x: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sigmoid(F.linear(x, w)) * v, v.neg().exp() + 1

    inputs = torch.randn(6, 16), torch.randn(1, 16), torch.randn(6, 16)
    with inductor_config.patch({HOOK: mine}), gatefuse.fusing() as report, torch.no_grad():
        results = torch.compile(fn)(*inputs)
    assert report.fused == 1
    torch.testing.assert_close(results, fn(*inputs))


def test_a_pass_added_after_gatefuse_stays() -> None:
    if not takes_lists():
        pytest.skip("this PyTorch's hooks hold one pass")
    log: list[tuple[str, int]] = []
    gatefuse.enable()
    hook = [getattr(inductor_config, HOOK), Watcher("after", log)]
    with inductor_config.patch({HOOK: hook}):
        report_of()
        gatefuse.disable()
        report_of()
    assert [name for name, _ in log] == ["after", "after"]
    assert log[-1] == ("after", 0)


def test_pass_on_the_pre_hook() -> None:
    with inductor_config.patch({PRE_HOOK: GateFusionPass()}):
        assert report_of(addend_first).fused == 1


def test_a_chain_of_passes_is_picklable_and_identified() -> None:
    log: list[tuple[str, int]] = []
    chains = [hooks.append_pass(Watcher(name, log), GateFusionPass()) for name in ("a", "b")]
    uuids = [chain.uuid() for chain in chains]
    assert uuids[0] != uuids[1]
    pickle.loads(pickle.dumps(chains[0]))
