"""Runs the cases of a suite, most telling first, in several processes, one at a time on the device.

Compiling is nearly all of a benchmark's wall time and needs no device; what is timed, by the
benchmark or by Inductor's own tuning, must have the device for itself. So whatever is timed holds a
lock that the processes share.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, TimeoutError, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from filelock import BaseFileLock, FileLock
from pebble import ProcessExpired, ProcessPool

GRACE_S = 15.0  # what cases that outlast the deadline are given to end

Row = dict[str, Any]
Item = TypeVar("Item")
Result = TypeVar("Result")
Work = Callable[[Item, BaseFileLock], Result]

_folder = ""  # of this process's pool


@dataclass(frozen=True)
class Run:
    """What all cases of a run share. device: ``"cuda"`` or ``"cpu"``; rounds: samples of each
    provider; small: toy sizes, where a suite has them; processes: that compile; time_budget:
    seconds."""

    device: str
    rounds: int
    small: bool
    out: Path
    processes: int
    time_budget: float


def sweep(
    kind: str,
    run: Run,
    cases: Sequence[Any],
    work: Work[Any, list[Row]],
    keys: Callable[[Any], list[Row]] = lambda case: [asdict(case)],
) -> tuple[Path, int]:
    """Run ``work`` on the cases until the time budget is over; write the results after each.

    keys: the rows, without values, of a case whose process died. Returns the result file and an
    exit code: 1 if a provider failed, 2 if the time was over before all cases were measured.
    """
    from benchmarks import store  # its pandas is not for the processes that measure

    begin = time.monotonic()
    path = store.new_path(run.out, kind)
    # Many processes compile at once: each does it by itself, and tuning prints no tables.
    if run.processes > 1:
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    os.environ["TORCHINDUCTOR_AUTOTUNE_NUM_CHOICES_DISPLAYED"] = "0"
    header = store.header(run.device, sys.argv[1:]) | {"quick": run.small}
    content: dict[str, Any] = {"kind": kind, "header": header}
    content |= {"rows": [], "not_run": [asdict(case) for case in cases]}
    failed = 0
    for case, rows, error in spread(work, cases, run.processes, begin + run.time_budget):
        if rows is None:
            print(error, file=sys.stderr, flush=True)
            rows = [row | {"error": str(error).strip()[-500:]} for row in keys(case)]
        content["rows"] += rows
        content["not_run"].remove(asdict(case))
        store.write(path, content)
        wrong = [row for row in rows if "error" in row]
        failed += len(wrong)
        seconds, timed = time.monotonic() - begin, len(rows) - len(wrong)
        lines = [f"{seconds:5.0f} s  {case}: {timed} timed, {len(wrong)} failed", *wrong]
        print(*lines, sep="\n        ", file=sys.stderr, flush=True)
    store.write(path, content)
    return path, 1 if failed else 2 if content["not_run"] else 0


def spread(
    work: Work[Item, Result], items: Sequence[Item], processes: int, deadline: float
) -> Iterator[tuple[Item, Result | None, str | None]]:
    """Yield ``(item, result, error)`` in the order of completion; the first items start first.

    No item starts that would, at the longest duration seen so far, end after ``deadline`` (by
    ``time.monotonic``); items still running ``GRACE_S`` after it are abandoned. A process whose
    item failed, perhaps by the device's fault, is replaced. ``work`` is a top-level function.
    """
    pending = deque(items)
    running: dict[Future[Result], tuple[Item, float]] = {}
    longest = 0.0
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="gatefuse-") as folder:
        pool = ProcessPool(processes, initializer=_begin, initargs=(folder,), context=context)
        try:
            while pending or running:
                while pending and len(running) < processes:
                    now = time.monotonic()
                    if now + longest > deadline:
                        pending.clear()
                        break
                    item, left = pending.popleft(), deadline + GRACE_S - now
                    running[pool.schedule(_do, args=(work, item), timeout=left)] = item, now
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    item, begun = running.pop(future)
                    longest = max(longest, time.monotonic() - begun)
                    with contextlib.suppress(TimeoutError):
                        try:
                            yield item, future.result(), None
                        except ProcessExpired as death:
                            note = Path(folder, str(death.pid))
                            text = note.read_text() if note.exists() else "the process died"
                            yield item, None, text
        finally:
            pool.stop()
            pool.join()


def _begin(folder: str) -> None:
    global _folder
    _folder = folder


def _do(work: Work[Item, Result], item: Item) -> Result:
    try:
        # Polled often: Inductor's tuning takes it for each of many short measurements.
        lock = FileLock(Path(_folder, "device"), poll_interval=0.001, is_singleton=True)
        return work(item, lock)
    except Exception:
        Path(_folder, str(os.getpid())).write_text(traceback.format_exc(limit=-8))
        os._exit(1)


def guard_tuning(lock: BaseFileLock) -> None:
    """Take the lock around every measurement that Inductor makes to choose a kernel."""
    from torch._inductor.runtime.benchmarking import benchmarker

    measure = benchmarker.benchmark_gpu
    if hasattr(measure, "guarded"):
        return

    @functools.wraps(measure)
    def alone(*args: Any, **kwargs: Any) -> Any:
        with lock:
            return measure(*args, **kwargs)

    alone.guarded = True  # type: ignore[attr-defined]
    benchmarker.benchmark_gpu = alone  # type: ignore[method-assign]


def rotated(
    calls: dict[Any, Callable[[Any], Any]], sets: Sequence[Any], samples: int, run: Run
) -> dict[Any, Row]:
    """Device time of each of ``calls``, over a rotation of input sets, ``samples`` calls in a
    sample: columns of a result row."""
    import torch

    from gatefuse.bench.timing import Replay, interleaved

    pool = torch.cuda.graph_pool_handle() if run.device == "cuda" else None

    def replay(call: Callable[[Any], Any]) -> Replay:
        return Replay(lambda i: (call(sets[i % len(sets)]),), samples, run.device, pool)

    replays = {key: replay(call) for key, call in calls.items()}
    return interleaved(replays, run.rounds, run.device)
