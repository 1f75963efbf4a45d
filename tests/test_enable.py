"""`enable` and `fusing`: gatefuse for the whole process, and for a block."""

from __future__ import annotations

import pytest
import torch
import torch._inductor.config as inductor_config

import gatefuse
from gatefuse.inductor import hooks
from gatefuse.inductor.fusion_pass import GateFusionPass
from tests.support.comparison import report_of
from tests.support.forms import addend_first, linear, linear_bias, make_inputs
from tests.support.hooks import HOOK


def test_enable_and_disable_are_idempotent() -> None:
    before = getattr(inductor_config, HOOK)
    gatefuse.enable()
    gatefuse.enable(placement="inline")
    assert len(hooks.passes_of(getattr(inductor_config, HOOK))) == 1
    assert [site.placement for site in report_of().sites] == ["inline"]
    gatefuse.disable()
    gatefuse.disable()
    assert getattr(inductor_config, HOOK) is before
    assert report_of().fused == 0


def test_enable_and_options_fuse_once() -> None:
    gatefuse.enable()
    report = report_of(options=gatefuse.options())
    assert (report.fused, len(report.graphs)) == (1, 1)


def test_backward_graphs_of_compiled_autograd_expect_nothing() -> None:
    from torch._dynamo import compiled_autograd

    inputs = make_inputs(linear, grad=True)
    gatefuse.enable(expect=1)
    with gatefuse.record() as report:
        out = torch.compile(linear)(*inputs)
        with compiled_autograd._enable(torch.compile(backend="inductor")):
            out.sum().backward()
    assert [(g.phase, g.fused) for g in report.graphs] == [("forward", 1), ("backward", 0)]


def test_fusing_is_scoped() -> None:
    with gatefuse.fusing() as outer:
        report_of()
        with gatefuse.fusing(placement="inline") as inner:
            report_of(linear_bias)
        report_of(addend_first)
    report_of()
    assert inner.fused == 1
    assert outer.fused == 3
    assert getattr(inductor_config, HOOK) is None


def test_fusing_keeps_what_was_enabled() -> None:
    gatefuse.enable(placement="inline")
    with gatefuse.fusing(eager_rounding=True):
        pass
    (kept,) = hooks.passes_of(getattr(inductor_config, HOOK))
    assert isinstance(kept, GateFusionPass)
    assert kept.options == gatefuse.Options(placement="inline")


def test_fusing_restores_after_an_error() -> None:
    with pytest.raises(KeyError), gatefuse.fusing():
        raise KeyError
    assert getattr(inductor_config, HOOK) is None


def test_fusing_expect() -> None:
    with gatefuse.fusing(expect=2):
        report_of()
        report_of(linear_bias)
    with (
        pytest.raises(gatefuse.FusionError, match="expected at least 2 fused gates, fused 1"),
        gatefuse.fusing(expect=2),
    ):
        report_of()


def test_dynamo_reset_inside_a_block() -> None:
    with gatefuse.fusing() as report:
        report_of()
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        report_of(linear_bias)
    assert report.fused == 2
