"""`gatefuse.explain`: what would be fused, and nothing left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import gatefuse
from tests.support.forms import Gate, H, linear, make_inputs
from tests.support.hooks import HOOK


def test_explain() -> None:
    x, w, v = make_inputs(linear, grad=True)
    compiled = torch.compile(linear)
    compiled(x, w, v)
    report = gatefuse.explain(linear, x, w, v)
    assert {g.phase: g.fused for g in report.graphs}["forward"] == 1
    assert {g.phase for g in report.graphs} == {"forward", "backward"}
    assert x.grad is None
    assert w.grad is None
    assert getattr(inductor_config, HOOK) is None
    with gatefuse.record() as later, torch._dynamo.config.patch(error_on_recompile=True):
        compiled(x, w, v)
    assert not later.graphs


def test_explain_with_warm_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every site is seen again, and the cache holds compiled kernels alone: no graph, and no folder
    for each graph."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with (
        inductor_config.patch(fx_graph_cache=True),
        functorch_config.patch(enable_autograd_cache=True),
    ):
        for _ in range(2):
            assert gatefuse.explain(linear, *make_inputs(linear)).fused == 1
    kept = {path.name for path in tmp_path.iterdir()}
    assert kept
    assert not {name for name in kept if name.startswith("tmp")}
    assert kept.isdisjoint({"fxgraph", "aotautograd"})


def test_explain_of_a_call_that_goes_backward() -> None:
    def step(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        loss = linear(x, w, v).sum()
        loss.backward()
        return loss

    report = gatefuse.explain(step, *make_inputs(linear, grad=True))
    assert {g.phase: g.fused for g in report.graphs}["forward"] == 1


def test_explain_of_a_complex_result() -> None:
    def wave(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        return torch.complex(linear(x, w, v), v)

    report = gatefuse.explain(wave, *make_inputs(linear, grad=True))
    assert {g.phase: g.fused for g in report.graphs}["forward"] == 1
    assert {g.phase for g in report.graphs} == {"forward", "backward"}


def test_explain_of_a_module_that_has_compiled_itself() -> None:
    model, inputs = Gate(), (torch.randn(5, H), torch.randn(5, H))
    model.compile()
    with torch.no_grad():
        model(*inputs)
        assert gatefuse.explain(model, *inputs).fused == 1
        assert gatefuse.explain(torch.compile(Gate()), *inputs).fused == 1


def test_explain_tells_of_rejections() -> None:
    def scaled(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        return torch.sigmoid(3 * nn.functional.linear(x, w)) * v

    with torch.no_grad():
        report = gatefuse.explain(scaled, *make_inputs(linear))
    (rejection,) = report.rejections
    assert report.fused == 0
    assert rejection.reason in str(report)


def test_explain_without_data_is_a_scan() -> None:
    with torch.device("meta"):
        model = Gate()
    inputs = (torch.randn(5, H), torch.randn(5, H))
    with FakeTensorMode():
        fake = torch.empty(5, H), torch.empty(5, H)
    for target, args in ((model, inputs), (Gate(), fake), (Gate(), [x.to("meta") for x in inputs])):
        report = gatefuse.explain(target, *args)
        assert report.verdict == "1 of 1 gates fuse"
        assert {g.phase for g in report.graphs} == {"forward", "backward"}
    with torch.no_grad():
        assert [g.phase for g in gatefuse.explain(model, *inputs).graphs] == ["inference"]
