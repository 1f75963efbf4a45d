"""A report, and its `expect`, belong to the thread that opened it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import gatefuse
from tests.support.comparison import BACKEND
from tests.support.programs import run_python


def gate(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(F.linear(x, w)) * x


def compile_gate() -> None:
    with torch.no_grad():
        torch.compile(gate, backend=BACKEND)(torch.randn(6, 16), torch.randn(1, 16))


def in_a_thread(function: Any) -> None:
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


def test_expect_is_not_met_by_another_thread() -> None:
    with pytest.raises(gatefuse.FusionError), gatefuse.fusing(expect=1) as report:
        in_a_thread(compile_gate)
    assert report.graphs == []


def test_a_thread_has_its_own_report() -> None:
    def other() -> None:
        with gatefuse.record() as own:
            compile_gate()
        reports.append(own)

    reports: list[gatefuse.Report] = []
    with gatefuse.record() as outer:
        in_a_thread(other)
        assert outer.fused == 0
        torch._dynamo.reset()
        compile_gate()
    assert [reports[0].fused, outer.fused] == [1, 1]


def test_reports_nest() -> None:
    with gatefuse.record() as outer:
        with gatefuse.record() as inner:
            compile_gate()
        torch._dynamo.reset()
        compile_gate()
    assert [inner.fused, outer.fused] == [1, 2]


def test_graphs_that_another_thread_takes_from_the_cache_do_not_count(tmp_path: Path) -> None:
    code = """
        import threading, torch, gatefuse
        from tests.test_threads import compile_gate
        with gatefuse.record() as first:
            compile_gate()
        torch._dynamo.reset()
        with gatefuse.record() as outer:
            thread = threading.Thread(target=compile_gate)
            thread.start()
            thread.join()
        torch._dynamo.reset()
        with gatefuse.record() as own:
            compile_gate()
        assert own.from_cache, own
        print(first.fused, outer.fused, own.fused)
    """
    done = run_python(
        code,
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path),
        TORCHINDUCTOR_FX_GRAPH_CACHE="1",
        TORCHINDUCTOR_AUTOGRAD_CACHE="1",
    )
    assert done.stdout.split() == ["1", "0", "1"]
