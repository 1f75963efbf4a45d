"""The comparison of the kernel's machine code sees a change, and only a change."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks import compare_sass
from gatefuse import kernels

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")

MASKED = "masked, all operands"


def compare(before: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(compare_sass, "SHAPES", {MASKED: compare_sass.SHAPES[MASKED]})
    monkeypatch.setattr(compare_sass, "source_at", lambda revision: before)
    return compare_sass.main(["before"])


def test_same_source(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(Path(kernels.__file__).read_text(), monkeypatch) == 0
    (row,) = (line for line in capsys.readouterr().out.splitlines() if MASKED in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    # A block of 4096 on 256 threads is two loads of eight elements for each operand, and the bias.
    assert cells[2:4] == ["9", "3"]
    assert cells[5:] == ["0", "identical"]


def test_a_store_more(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = Path(kernels.__file__).read_text()
    store = "        tl.store(logit_ptr + row,"
    assert store in now
    before = now.replace(store, "        tl.store(logit_ptr + row + 1, 0.0)\n" + store)
    assert compare(before, monkeypatch) == 1
    assert "| 4 -> 3 |" in capsys.readouterr().out
