"""Many processes that compile and tune, one at a time on the device.

Compiling is nearly all of a benchmark's wall time and needs no device; what is timed, by the
benchmark or by Inductor's own tuning, must have the device for itself. So each item of work runs
in one of several processes, and whatever is timed holds a lock that they share.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar, cast

GRACE_S = 15.0  # what items that outlast the deadline are given to end

Item = TypeVar("Item")
Result = TypeVar("Result")


class DeviceLock:
    """Context manager: this process alone uses the device. Reentrant; one thread per process.

    The lock is a file's: it is freed when its holder dies.
    """

    def __init__(self, path: str) -> None:
        self._file = open(path, "a")  # noqa: SIM115 (held open as long as the process lives)
        self._depth = 0

    def __enter__(self) -> None:
        if self._depth == 0:
            fcntl.flock(self._file, fcntl.LOCK_EX)
        self._depth += 1

    def __exit__(self, *exc: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def guard_inductor(self) -> None:
        """Take the lock around every measurement that Inductor makes to choose a kernel."""
        from torch._inductor.runtime.benchmarking import benchmarker

        measure = benchmarker.benchmark_gpu

        @functools.wraps(measure)
        def alone(*args: Any, **kwargs: Any) -> Any:
            with self:
                return measure(*args, **kwargs)

        benchmarker.benchmark_gpu = alone  # type: ignore[method-assign]


def _serve(connection: Connection, lock_path: str, work: Callable[[Any, DeviceLock], Any]) -> None:
    lock = DeviceLock(lock_path)
    lock.guard_inductor()
    with contextlib.suppress(EOFError):  # the parent is done
        while True:
            item = connection.recv()
            try:
                connection.send((work(item, lock), None))
            except Exception:  # perhaps the device's fault: the parent replaces this process
                connection.send((None, traceback.format_exc(limit=-8)))


def spread(
    work: Callable[[Item, DeviceLock], Result],
    items: Sequence[Item],
    processes: int,
    deadline: float,
) -> Iterator[tuple[Item, Result | None, str | None]]:
    """Yield ``(item, result, error)`` in the order of completion; the first items start first.

    No item starts that would, at the longest duration seen so far, end after ``deadline`` (by
    ``time.monotonic``); items still running ``GRACE_S`` after it are abandoned. A process whose
    item failed is replaced, the item yielded with its error. ``work`` is a top-level function.
    """
    context = multiprocessing.get_context("spawn")
    pending = list(items)
    running: dict[Connection, tuple[Item, float]] = {}
    idle: list[Connection] = []
    children: dict[Connection, Any] = {}
    longest = 0.0

    with tempfile.NamedTemporaryFile(prefix="gatefuse-device-lock-") as lock_file:

        def start_process() -> Connection:
            ours, theirs = context.Pipe()
            child = context.Process(
                target=_serve, args=(theirs, lock_file.name, work), daemon=False
            )
            child.start()
            theirs.close()
            children[ours] = child
            return ours

        def end_process(connection: Connection) -> None:
            connection.close()
            child = children.pop(connection)
            child.kill()
            child.join()

        try:
            while pending or running:
                while pending and time.monotonic() + longest < deadline:
                    if not idle and len(running) < processes:
                        idle.append(start_process())
                    if not idle:
                        break
                    connection, item = idle.pop(), pending.pop(0)
                    running[connection] = (item, time.monotonic())
                    with contextlib.suppress(OSError):  # it died: its end of the pipe says so below
                        connection.send(item)
                if not running:
                    return
                ready = wait(list(running), timeout=1.0)
                if not ready and time.monotonic() > deadline + GRACE_S:
                    return
                for connection in cast(list[Connection], ready):
                    item, begun = running.pop(connection)
                    longest = max(longest, time.monotonic() - begun)
                    try:
                        result, error = connection.recv()
                    except (EOFError, ConnectionError):
                        result, error = None, "the process died"
                    if error is None:
                        idle.append(connection)
                    else:
                        end_process(connection)
                    yield item, result, error
        finally:
            for connection in list(children):
                end_process(connection)
