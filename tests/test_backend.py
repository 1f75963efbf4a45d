"""The backend "gatefuse": by name, by function, with options of both and in every mode."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import gatefuse
from tests.support.comparison import BACKEND, INSTALLED, report_of
from tests.support.forms import Gate, H, linear, linear_bias, make_inputs
from tests.support.judge import judge
from tests.support.programs import run_python

BF16 = torch.bfloat16


@pytest.mark.skipif(not INSTALLED, reason="the distribution is not installed: no entry point")
def test_backend_by_name_without_importing_gatefuse() -> None:
    done = run_python(
        """
        import sys, torch
        from tests.support.forms import linear, make_inputs
        assert "gatefuse" in torch.compiler.list_backends(exclude_tags=())
        assert "gatefuse" not in sys.modules
        args = make_inputs(linear)
        out = torch.compile(linear, backend="gatefuse")(*args)
        assert torch.allclose(out, linear(*args), atol=1e-5)
        import gatefuse
        from torch._dynamo.utils import counters
        print(counters["inductor"]["gatefuse_fused"])
        """
    )
    assert done.stdout.split()[-1] == "1"


@pytest.mark.parametrize(
    "mode",
    ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"],
)
def test_modes(mode: str) -> None:
    assert report_of(backend=BACKEND, mode=mode, fullgraph=True).fused == 1


def test_backend_takes_options_of_both() -> None:
    options = {"max_autotune": False, "epilogue_fusion": True, "gatefuse.placement": "inline"}
    report = report_of(backend=BACKEND, options=options)
    assert [site.placement for site in report.sites] == ["inline"]


def test_kernel_placement_falls_back_on_the_cpu() -> None:
    report = report_of(backend=BACKEND, options={"gatefuse.placement": "kernel"})
    (site,) = report.sites
    assert site.placement == "inline"
    assert site.placement_reason


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gatefuse.placment": "inline"}, "placment"),
        ({"gatefuse.placement": "fast"}, "placement must be one of"),
        ({"gatefuse.expect": -1}, "expect must be a number"),
        ({"gatefuse.eager_rounding": "yes"}, "eager_rounding must be a bool"),
        ({"no_such_inductor_option": 1}, "no_such_inductor_option"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        torch.compile(linear, backend=BACKEND, options=options)(*make_inputs(linear))


def test_backend_expect() -> None:
    assert report_of(backend=BACKEND, options={"gatefuse.expect": 1}).fused == 1
    with pytest.raises(Exception, match="expected at least 2 fused gates in the graph, fused 1"):
        report_of(backend=BACKEND, options={"gatefuse.expect": 2})


def gate_beside_a_branch(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return linear(x, w, torch.cond(x.sum() > 0, torch.sin, torch.cos, (v,)))


def gate_in_a_branch(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, linear, lambda x, w, v: torch.cos(v), (x, w, v))


@pytest.mark.parametrize("fn", [gate_beside_a_branch, gate_in_a_branch])
def test_expect_counts_a_graph_with_its_subgraphs(fn: Callable[..., Any]) -> None:
    """A branch without a gate is no failure, and a gate in a branch counts."""
    with torch.no_grad(), gatefuse.record() as report:
        torch.compile(fn, backend=BACKEND, options={"gatefuse.expect": 1})(*make_inputs(fn))
    assert report.fused == 1
    assert [g.phase for g in report.graphs] == ["subgraph", "subgraph", "inference"]
    with torch.no_grad(), pytest.raises(Exception, match=r"expected at least 2 .* fused 1"):
        torch.compile(fn, backend=BACKEND, options={"gatefuse.expect": 2})(*make_inputs(fn))


def test_cpp_wrapper() -> None:
    report = report_of(linear_bias, backend=BACKEND, options={"cpp_wrapper": True})
    assert report.fused == 1


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["fp32", "bf16"])
def test_freezing(dtype: torch.dtype) -> None:
    """Constant weights may be packed for the CPU; then the report says so. The result is right."""
    model = Gate().to(dtype).eval()
    x, v = torch.randn(9, H).to(dtype), torch.randn(9, H).to(dtype)
    with torch.no_grad(), gatefuse.record() as report:
        compiled = torch.compile(model, backend=BACKEND, options={"freezing": True})
        result, eager = compiled(x, v), model(x, v)
        judge("result", result, eager, model.double()(x.double(), v.double()))
    assert report.fused + len(report.rejections) == 1
    assert all(r.reason for r in report.rejections)


def test_threads_compile_with_the_backend_and_with_options() -> None:
    """Since PyTorch 2.13 a thread has its own configuration of Inductor; what goes with the model
    holds in every thread."""

    def compile_both() -> int:
        with gatefuse.record() as report:
            report_of(backend=BACKEND)
            report_of(options=gatefuse.options())
        return report.fused

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(compile_both).result() == 2
