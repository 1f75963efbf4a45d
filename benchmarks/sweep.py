"""Runs the cells of one question, most telling first, and writes the results after each."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from benchmarks import store as results
from benchmarks.store import Row
from benchmarks.workers import DeviceLock, spread

CellType = TypeVar("CellType")


@dataclass(frozen=True)
class Setting:
    """What all cells of a run share. device: ``"cuda"`` or ``"cpu"``; rounds: samples of each arm;
    small: toy sizes, where a question has them."""

    device: str
    rounds: int
    seed: int = 0
    small: bool = False


def sweep(
    kind: str,
    device: str,
    cells: Sequence[CellType],
    work: Callable[[CellType, DeviceLock], list[Row]],
    failed_rows: Callable[[CellType, str], list[Row]],
    out: Path,
    processes: int,
    time_budget: float,
) -> tuple[Path, int]:
    """Run ``work`` on the cells, in several processes, for at most ``time_budget`` seconds.

    ``failed_rows`` makes the rows of a cell whose process died. Returns the result file and an exit
    code: 1 if an arm failed, 2 if the time was over before all cells were measured.
    """
    begin = time.monotonic()
    path = results.new_path(out, kind)
    # Many processes compile at once: each does it by itself, and tuning prints no tables.
    if processes > 1:
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    os.environ["TORCHINDUCTOR_AUTOTUNE_NUM_CHOICES_DISPLAYED"] = "0"
    content: dict[str, Any] = {
        "kind": kind,
        "header": results.header(device, sys.argv[1:]),
        "rows": [],
        "not_run": [asdict(cell) for cell in cells],  # type: ignore[call-overload]
    }
    failed = 0
    for cell, rows, error in spread(work, cells, processes, begin + time_budget):
        if rows is None:
            print(error, file=sys.stderr, flush=True)
            rows = failed_rows(cell, str(error).strip()[-500:])
        content["rows"] += rows
        content["not_run"].remove(asdict(cell))  # type: ignore[call-overload]
        results.write(path, content)
        wrong = [row for row in rows if "error" in row]
        failed += len(wrong)
        print(
            f"{time.monotonic() - begin:5.0f} s  {cell}: {len(rows) - len(wrong)} timed, "
            f"{len(wrong)} failed",
            file=sys.stderr,
            flush=True,
        )
        for row in wrong:
            print(f"        {row}", file=sys.stderr, flush=True)
    results.write(path, content)
    return path, 1 if failed else 2 if content["not_run"] else 0


def default_processes() -> int:
    """All cores but two, 14 at most: what is timed still has a core for itself."""
    return max(1, min(14, (os.cpu_count() or 1) - 2))
