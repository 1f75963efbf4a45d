"""The pass and vLLM's own configuration and pass manager, without an engine."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import gatefuse
from gatefuse import Options
from gatefuse.inductor.fusion_pass import GateFusionPass
from gatefuse.integrations import vllm as integration
from gatefuse.integrations.vllm import passes

pytest.importorskip("vllm")
from vllm.compilation.passes.inductor_pass import InductorPass, pass_context
from vllm.config import CompilationConfig, VllmConfig, set_current_vllm_config
from vllm.config.utils import Range

HOOK = "post_grad_custom_post_pass"


class OwnPass(InductorPass):
    """None of gatefuse's."""

    seen: list[int] = []  # noqa: RUF012

    def __call__(self, graph: Any) -> None:
        self.seen.append(ops(graph))


def graph() -> torch.fx.Graph:
    def gate(x: torch.Tensor, w: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(torch.mm(x, w.permute(1, 0))) * v

    return make_fx(gate, tracing_mode="fake")(
        torch.randn(8, 64), torch.randn(1, 64), torch.randn(8, 64)
    ).graph


def ops(graph: Any) -> int:
    op = torch.ops.gatefuse.linear_sigmoid_mul.default
    return len(graph.find_nodes(op="call_function", target=op))


def named() -> CompilationConfig:
    return CompilationConfig(mode=3, inductor_passes={HOOK: "gatefuse.vllm_pass"})


def with_pass(graph_pass: Any) -> CompilationConfig:
    return CompilationConfig(mode=3, inductor_compile_config={HOOK: graph_pass})


def test_by_name() -> None:
    """As the command line gives it: the pass, with which the plugin goes on, and no second one."""
    config = named()
    assert isinstance(config.inductor_compile_config[HOOK], integration.VllmGateFusionPass)
    added = passes.add_pass(config)
    assert type(added) is integration.VllmGateFusionPass
    assert added.before == ()
    assert passes.add_pass(config) is added is passes.pass_of(config)


@pytest.mark.parametrize(
    "given",
    [GateFusionPass, integration.VllmGateFusionPass],
    ids=["inductors", "vllms"],
)
def test_options_that_come_with_the_pass_are_kept(given: Any) -> None:
    options = Options(placement="inline", eager_rounding=True, expect=2)
    config = CompilationConfig(mode=3)
    config.inductor_compile_config[HOOK] = given(options)
    assert passes.add_pass(config).options == options


def test_another_pass_stays_in_front() -> None:
    own = OwnPass()
    config = with_pass(own)
    added = passes.add_pass(config)
    assert added.before == (own,)
    OwnPass.seen.clear()
    g = graph()
    added(g)
    assert OwnPass.seen == [0]
    assert ops(g) == 1


def test_uuid() -> None:
    """Covers what changes the code, and nothing else; other passes on the hook are part of it."""
    make = integration.VllmGateFusionPass
    different = [
        make(),
        make(Options(eager_rounding=True)),
        make(Options(placement="inline")),
        make(before=(OwnPass(),)),
        make(hoisted=("model.layers.0.mlp.experts",)),
    ]
    assert len({p.uuid() for p in different}) == len(different)
    assert make(Options(expect=3)).uuid() == make().uuid()


def test_compile_hash_of_the_engine_changes() -> None:
    config = VllmConfig(compilation_config=CompilationConfig(mode=3))
    before = config.compute_hash()
    added = passes.add_pass(config.compilation_config)
    with_it = config.compute_hash()
    added.hoisted.append("model.layers.0.mlp.experts")
    assert len({before, with_it, config.compute_hash()}) == 3


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_copies(copied: Any) -> None:
    original = integration.VllmGateFusionPass(Options(eager_rounding=True), (), ("layer",))
    for graph_pass in (original, gatefuse.vllm_pass):
        new = copied(graph_pass)
        assert type(new) is integration.VllmGateFusionPass
        assert new.uuid() == graph_pass.uuid()


def test_outside_and_inside_a_pass_context() -> None:
    outside, inside = graph(), graph()
    integration.VllmGateFusionPass()(outside)
    with pass_context(Range(1, 8)):
        integration.VllmGateFusionPass()(inside)
    assert (ops(outside), ops(inside)) == (1, 1)


def test_in_vllms_pass_manager() -> None:
    from vllm.compilation.passes.pass_manager import PostGradPassManager
    from vllm.compilation.passes.vllm_inductor_pass import VllmPatternMatcherPass

    config = VllmConfig(compilation_config=named())
    manager = PostGradPassManager()
    with set_current_vllm_config(config):
        manager.configure(config)
    manager.add(passes.add_pass(config.compilation_config))
    matches = VllmPatternMatcherPass.match_table["gatefuse"]
    g = graph()
    with pass_context(Range(1, 8)):
        for graph_pass in manager.passes:
            graph_pass(g)
        assert manager.uuid()
    assert ops(g) == 1
    assert VllmPatternMatcherPass.match_table["gatefuse"] == matches + 1
