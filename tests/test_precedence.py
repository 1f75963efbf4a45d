"""Two ways of turning gatefuse on at once: what is given in the nearer one wins, field by field."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import gatefuse
from tests.support.comparison import BACKEND


def gate(x: torch.Tensor, w: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(F.linear(x, w)) * v


FORCED = "kernel was forced, but Inductor's C++ serves the CPU"
AUTO = "Inductor's C++ serves the CPU"


def reason_of(compile: Callable[[], Any]) -> str:
    """Why the gate became what it is, which tells the placement that was asked for."""
    torch._dynamo.reset()
    inputs = torch.randn(4, 16), torch.randn(1, 16), torch.randn(4, 16)
    with gatefuse.record() as report, torch.no_grad():
        compile()(*inputs)
    return report.sites[0].placement_reason


def plain() -> Any:
    return torch.compile(gate)


def backend(**options: Any) -> Any:
    return torch.compile(gate, backend=BACKEND, options=options or None)


def backend_with_a_mode() -> Any:
    return torch.compile(gate, backend=BACKEND, mode="default")


def with_options(**options: Any) -> Any:
    return torch.compile(gate, options=gatefuse.options(**options))


def backend_with_options(**options: Any) -> Any:
    return torch.compile(gate, backend=BACKEND, options=gatefuse.options(**options))


WAYS = [plain, backend, backend_with_a_mode, with_options, backend_with_options]


@pytest.fixture(params=["process", "block", "environment", "pre-hook"])
def outside(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Something around a compile that forces the kernel and expects nine gates."""
    config = torch._inductor.config
    if request.param == "process":
        gatefuse.enable(placement="kernel", expect=9)
        yield request.param
        gatefuse.disable()
    elif request.param == "block":
        with gatefuse.fusing(placement="kernel"):
            yield request.param
    elif request.param == "environment":
        monkeypatch.setenv("GATEFUSE_PLACEMENT", "kernel")
        monkeypatch.setenv("GATEFUSE_EXPECT", "9")
        yield request.param
    else:
        from gatefuse.inductor.fusion_pass import GateFusionPass

        options = gatefuse.Options(placement="kernel", expect=9)
        with config.patch(post_grad_custom_pre_pass=GateFusionPass(options)):
            yield request.param


@pytest.mark.parametrize("way", WAYS)
def test_what_is_given_outside_is_not_lost(way: Callable[..., Any], outside: str) -> None:
    if way is plain and outside == "environment":
        pytest.skip("nothing turns gatefuse on")
    if outside != "block":  # its expect counts at its end
        with pytest.raises(Exception, match="expected at least 9 fused gates"):
            reason_of(way)
        return
    assert reason_of(way) == FORCED


@pytest.mark.parametrize("way", [with_options, backend_with_options])
def test_the_compiles_own_options_win(way: Callable[..., Any], outside: str) -> None:
    """Also those that are given as the default; the other fields stay the outer ones."""
    assert reason_of(lambda: way(placement="auto", expect=0)) == AUTO
    assert reason_of(lambda: way(expect=0)) == FORCED


def test_the_backends_own_options_win(outside: str) -> None:
    own = {"gatefuse.placement": "auto", "gatefuse.expect": 0}
    assert reason_of(lambda: backend(**own)) == AUTO
    assert reason_of(lambda: backend(**{"gatefuse.expect": 0})) == FORCED


def test_the_backends_options_win_over_those_of_options() -> None:
    options = {**gatefuse.options(placement="kernel", expect=9), "gatefuse.expect": 0}
    assert reason_of(lambda: torch.compile(gate, backend=BACKEND, options=options)) == FORCED


def test_the_block_wins_over_the_process() -> None:
    gatefuse.enable(placement="inline", eager_rounding=True, expect=9)
    with gatefuse.fusing(placement="kernel", expect=1):
        assert reason_of(plain) == FORCED
    with gatefuse.fusing(expect=0), gatefuse.fusing(placement="auto"):
        assert reason_of(plain) == AUTO
        assert reason_of(backend) == AUTO


def test_the_inner_block_wins() -> None:
    with gatefuse.fusing(placement="kernel"):
        with gatefuse.fusing(placement="auto"):
            assert reason_of(backend) == AUTO
        assert reason_of(backend) == FORCED


def test_explain_takes_what_surrounds_it() -> None:
    inputs = torch.randn(4, 16), torch.randn(1, 16), torch.randn(4, 16)
    with gatefuse.fusing(placement="kernel"):
        assert gatefuse.explain(gate, *inputs).sites[0].placement_reason == FORCED
