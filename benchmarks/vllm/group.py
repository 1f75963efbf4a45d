"""Engines of vLLM in processes of their own, asked to do the same work: in turns or at once."""

from __future__ import annotations

import json
import multiprocessing
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pebble import ProcessPool

from benchmarks.vllm import engine
from benchmarks.vllm.engine import Workload

MIN_ROUNDS = 5
PROFILE_S = 45.0  # kept free for the profiles of a group
GRACE_S = 20.0  # how long after the deadline an engine is waited for


class EngineError(Exception):
    """An engine failed, died, or did not answer in time."""


class Remote:
    """An engine in another process, or in one for each of its tensor-parallel ranks. It starts with
    ``environment``, and a rank with what is its in ``ranks`` as well."""

    def __init__(
        self,
        provider: str,
        arguments: dict[str, Any],
        environment: dict[str, str],
        log: Path,
        deadline: float,
        ranks: Sequence[dict[str, str]] = ({},),
    ) -> None:
        self.provider, self.log, self.deadline = provider, log, deadline
        context = multiprocessing.get_context("spawn")
        logs = [log, *(log.with_suffix(f".{i}.log") for i in range(1, len(ranks)))]
        starts = [(environment | rank, path) for rank, path in zip(ranks, logs)]
        self._pools = [ProcessPool(1, 0, engine.begin, start, context) for start in starts]
        self._answers = self._schedule(engine.start, provider, arguments)

    def _schedule(self, function: Callable[..., Any], *args: Any) -> list[Future[Any]]:
        left = max(1.0, self.deadline + GRACE_S - time.monotonic())
        return [pool.schedule(function, args=args, timeout=left) for pool in self._pools]

    def ask(self, method: str, workload: Workload) -> None:
        """What is asked is told by :meth:`answer`."""
        self._answers = self._schedule(engine.ask, method, workload)

    def answer(self) -> Any:
        """The first rank's, once all have answered."""
        try:
            answers = [answer.result() for answer in self._answers]
            return answers[0]
        except Exception as error:  # TimeoutError: too late; ProcessExpired: the log says why
            raise EngineError(f"{self.provider}: {error!r}") from error

    def lines(self) -> list[str]:
        """gatefuse's lines in the engine's log, without prefixes."""
        return re.findall(r"gatefuse: .*", self.log.read_text())

    def close(self) -> None:
        for pool in self._pools:
            pool.stop()
            pool.join()


def refusal(provider: str, start: dict[str, Any]) -> str | None:
    """Why an engine is not what its provider claims to be, or None. start: what it told, with the
    ``lines`` that gatefuse logged in it."""
    log = "\n".join(start["lines"])
    fused = sum(map(int, re.findall(r"gatefuse: (\d+) of \d+ shared-expert gates fused", log)))
    if provider.startswith("plugin"):
        return None if fused else "for no gate was fused: it would be vLLM against itself"
    if fused:
        return f"for gatefuse fused {fused} gates"
    if provider == "hand-kernel" and not start["hand_gates"]:
        return "for no gate has the hand-written kernel"
    return None


class Group:
    """Engines that are up at the same time and take turns, or with ``at_once`` work at the same
    time; one that fails is left out from then on. Their results go to ``content``."""

    def __init__(
        self, engines: Sequence[Remote], content: dict[str, Any], *, at_once: bool = False
    ) -> None:
        self.engines, self.content, self.at_once = list(engines), content, at_once
        self.rows: dict[tuple[str, Workload], dict[str, Any]] = {}

    def wait(self, workloads: Sequence[Workload], start_number: int) -> None:
        """Until all have started; ``start_number`` counts the starts of each."""
        for remote in list(self.engines):
            if (start := self._answer(remote)) is None:
                continue
            start |= {"lines": remote.lines()}
            print(f"{remote.provider}: {json.dumps(start)}", flush=True)
            if (problem := refusal(remote.provider, start)) is not None:
                self._drop(remote, f"{remote.provider}: refused, {problem}")
                continue
            self.content["engines"][remote.provider] = start
            for workload in workloads:
                of = {"provider": remote.provider, **asdict(workload), "start": start_number}
                row = {**of, "seconds": []}
                self.rows[remote.provider, workload] = row
                self.content["rows"].append(row)

    def measure(self, rounds: int, share: float, deadline: float) -> None:
        """``MIN_ROUNDS`` rounds if the deadline allows it, ``rounds`` if the share lasts."""
        longest = 0.0
        for done in range(rounds + 1):  # the first warms up
            begin = time.monotonic()
            if begin + longest > (deadline if done <= MIN_ROUNDS else share) - PROFILE_S:
                break
            first = done % max(1, len(self.engines))
            for (provider, workload), seconds in self._ask("time" if done else "warm_up", first):
                if done:
                    self.rows[provider, workload]["seconds"].append(round(seconds, 5))
            longest = max(longest, time.monotonic() - begin) if done else 0.0
            print(f"round {done} ({time.monotonic() - begin:.0f} s)", flush=True)
        if self.engines and not longest:
            names = ", ".join(remote.provider for remote in self.engines)
            self._note(f"{names}: too little time for a round")
        for row in self.rows.values():
            row |= rates(row)

    def profile(self) -> None:
        for key, profile in self._ask("profile"):
            self.rows[key]["profile"] = profile

    def _ask(self, method: str, first: int = 0) -> Iterator[tuple[tuple[str, Workload], Any]]:
        """Ask every engine about each workload, beginning with another one each time."""
        for workload in dict.fromkeys(workload for _, workload in self.rows):
            engines = self.engines[first:] + self.engines[:first]
            for turn in [engines] if self.at_once else [[remote] for remote in engines]:
                for remote in turn:
                    remote.ask(method, workload)
                for remote in turn:
                    if (answer := self._answer(remote)) is not None:
                        yield (remote.provider, workload), answer

    def _answer(self, remote: Remote) -> Any:
        try:
            return remote.answer()
        except EngineError as error:
            self._drop(remote, str(error))
            return None

    def _drop(self, remote: Remote, error: str) -> None:
        self._note(error)
        self.engines.remove(remote)
        remote.close()

    def _note(self, error: str) -> None:
        self.content["errors"].append(error)
        print(error, file=sys.stderr, flush=True)

    def close(self) -> None:
        for remote in self.engines:
            remote.close()


def rates(row: dict[str, Any]) -> dict[str, Any]:
    """Tokens per second, new and all, at the median time; spread: (p90 - p10) / median."""
    seconds = sorted(row["seconds"])
    if not seconds:
        return {"repeats": 0}
    median = statistics.median(seconds)
    deciles = statistics.quantiles(seconds, n=10, method="inclusive") if len(seconds) > 1 else [0.0]
    new, all_ = row["tokens_out"], row["tokens_in"] + row["tokens_out"]
    return {
        "repeats": len(seconds),
        "new_tokens_per_s": round(row["sequences"] * new / median, 1),
        "tokens_per_s": round(row["sequences"] * all_ / median, 1),
        "spread": round((deciles[-1] - deciles[0]) / median, 4),
    }
