"""Puts a mutant in place, in a process of its own, and asks whether anything differs."""

from __future__ import annotations

import contextlib
import importlib
import logging
import operator
import os
import select
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator

import pytest
import torch

from tests.mutants.corpus import Corpus, interpreted, replay
from tests.mutants.mutations import Mutant

__all__ = ["first_difference", "first_failure", "in_children"]

_SECONDS = 60, 300
"""Processor time in which a child may replay graphs, and run tests: a mutant may never end."""


def _put_in_place(mutant: Mutant) -> None:
    """Give the function the mutant's code: whoever has imported it runs that from now on."""
    module = importlib.import_module(f"gatefuse.inductor.{mutant.module}")
    function = operator.attrgetter(mutant.function)(module)
    function = getattr(function, "fget", function)
    function = getattr(function, "__wrapped__", function)
    function.__code__ = mutant.code


def first_difference(mutant: Mutant, corpus: Corpus) -> str | None:
    """Replay the graphs whose matching calls the mutant's function; what differs first."""
    signal.setitimer(signal.ITIMER_PROF, _SECONDS[0])
    _put_in_place(mutant)
    for i, entry in enumerate(corpus.entries):
        if mutant.function in entry.functions:
            try:
                problem = replay(entry).problem(entry.expected)
            except Exception as e:
                problem = f"{type(e).__name__}: {e}"
            if problem is not None:
                return f"graph {i}: {problem}"
    return None


def first_failure(mutant: Mutant, corpus: Corpus) -> str | None:
    """Run the tests that call the mutant's function, code generation left out; the name of the
    first that fails."""
    tests = [test for test, called in corpus.passed.items() if mutant.function in called]
    if not tests:
        return None
    signal.setitimer(signal.ITIMER_PROF, _SECONDS[1])
    _put_in_place(mutant)
    failed: list[str] = []

    class Failed:
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.failed:
                failed.append(report.nodeid)

    with interpreted():
        pytest.main([*tests, "-x", "-q", "-p", "no:cacheprovider", "--tb=no"], plugins=[Failed()])
    return failed[0] if failed else None


def in_children(
    ask: Callable[[Mutant], str | None], mutants: Iterable[Mutant], jobs: int
) -> Iterator[tuple[Mutant, str | None]]:
    """What ``ask`` says of each mutant, asked in a forked process, or how that process died."""
    waiting = iter(mutants)
    running: dict[int, tuple[int, Mutant]] = {}  # by the end of a pipe: process, mutant
    while True:
        while len(running) < jobs and (mutant := next(waiting, None)) is not None:
            running.update([_forked(ask, mutant)])
        if not running:
            return
        for pipe in select.select(list(running), [], [])[0]:
            pid, mutant = running.pop(pipe)
            with open(pipe, encoding="utf-8") as stream:
                answer = stream.read()
            _, status = os.waitpid(pid, 0)
            if os.WIFSIGNALED(status):
                yield mutant, f"stopped by {signal.Signals(os.WTERMSIG(status)).name}"
            else:
                yield mutant, answer or None


def _forked(ask: Callable[[Mutant], str | None], mutant: Mutant) -> tuple[int, tuple[int, Mutant]]:
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write)
        return read, (pid, mutant)
    try:
        os.close(read)
        torch.set_num_threads(1)
        logging.disable(logging.CRITICAL)
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 1)
            os.dup2(nothing.fileno(), 2)
        try:
            answer = ask(mutant)
        except BaseException:
            answer = traceback.format_exc(limit=1).splitlines()[-1]
        with contextlib.suppress(BrokenPipeError):
            os.write(write, (answer or "")[:4000].encode())
    finally:
        os._exit(0)
