"""How long a call takes on the device.

A sample is the replay of a CUDA graph of many calls (on the CPU: a loop under the wall clock), each
on another input set of a rotation. A buffer of three times the L2 cache is read before each replay,
and no set is used twice in one unless the rotation is larger than that: every call finds its inputs
in device memory. Before that read the device spins while the host launches the graph. All providers
take turns, in a random order and then in its reverse: drift hits all alike.
"""

from __future__ import annotations

import functools
import math
import random
import statistics
import time
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)

COLD_FACTOR = 3  # an input is cold after this many times the L2 cache has been read
MAX_CALLS = 1024
LEAST_ROUNDS = 11
ENOUGH_S = 10.0
SPIN_CYCLES = 1_000_000
"""About half a millisecond; a graph of some hundred kernels is launched in less."""


def columns(samples_us: list[float], calls: int) -> dict[str, Any]:
    """Columns of a result row: µs per call over samples of ``calls`` calls each."""
    several = samples_us if len(samples_us) > 1 else samples_us * 2
    p10, *_, p90 = statistics.quantiles(several, n=10, method="inclusive")
    times = {"median_us": statistics.median(samples_us), "p10_us": p10, "p90_us": p90}
    return {name: round(us, 4) for name, us in times.items()} | {
        "repeats": len(samples_us),
        "calls": calls,
    }


@functools.cache
def cache_bytes(device: str) -> int:
    """Size of the device's last cache; on the CPU a nominal 16 MiB."""
    return torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else 16 << 20


def plan(set_bytes: int, moved_bytes: int, kernels: int, device: str) -> tuple[int, int]:
    """Number of input sets, of ``set_bytes``, and of calls in a sample, a multiple of it. A call
    moves ``moved_bytes`` in at least ``kernels`` launches.

    A sample lasts 1.5 ms or more, which makes the few microseconds around a replay vanish, and the
    rotation is larger than ``COLD_FACTOR`` caches or as long as the sample.
    """
    bytes_per_us, launch_us, sample_us = (4.3e6, 1.0, 1500) if device == "cuda" else (1e4, 50, 2000)
    floor_us = max(moved_bytes / bytes_per_us, kernels * launch_us)
    calls = min(max(math.ceil(sample_us / floor_us), 4), MAX_CALLS)
    sets = min(max(math.ceil(COLD_FACTOR * cache_bytes(device) / set_bytes), 2), calls)
    return sets, math.ceil(calls / sets) * sets


class Replay:
    """``calls`` calls of ``call(i)``, i counting up, captured in a CUDA graph (on the CPU: a loop).

    ``outputs`` are those of the last call; on CUDA each :meth:`run` writes them again in place.
    ``call`` must have run before: nothing may compile or tune during the capture.
    """

    def __init__(
        self, call: Callable[[int], tuple[torch.Tensor, ...]], calls: int, device: str, pool: Any
    ) -> None:
        self.calls = calls
        self.outputs: tuple[torch.Tensor, ...] = ()

        def run_all() -> None:
            for i in range(calls):
                self.outputs = call(i)

        self.run = run_all
        if device == "cuda":
            graph = torch.cuda.CUDAGraph()
            # The outer context restores the stream if the capture fails.
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"),
            ):
                run_all()
            self.run = graph.replay


def interleaved(replays: dict[Key, Replay], rounds: int, device: str) -> dict[Key, dict[str, Any]]:
    """Device time per call of each replay, as columns; one sample of each in every round.

    After ``ENOUGH_S`` seconds, which a slow CPU may need for large inputs, fewer rounds are enough.
    """
    samples: dict[Key, list[float]] = {key: [] for key in replays}
    flush = torch.zeros(COLD_FACTOR * cache_bytes(device) // 4, device=device)
    shuffled = random.Random(0)
    order = list(replays)
    for done in range(-2, rounds):  # the first two upload the graphs and bring the clocks up
        if done == 0:
            samples = {key: [] for key in replays}
            begin = time.monotonic()
        elif done >= LEAST_ROUNDS and time.monotonic() - begin > ENOUGH_S:
            break
        # Every second round reverses the one before: of two providers each is first as often.
        if done % 2:
            order.reverse()
        else:
            shuffled.shuffle(order)
        events = []
        for key in order:
            replay = replays[key]
            if device == "cuda":
                torch.cuda._sleep(SPIN_CYCLES)
                flush.sum()
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                replay.run()
                end.record()
                events.append((key, start, end))
            else:
                flush.sum()
                called = time.perf_counter()
                replay.run()
                samples[key].append((time.perf_counter() - called) * 1e6 / replay.calls)
        if device == "cuda":
            torch.cuda.synchronize()
        for key, start, end in events:
            samples[key].append(start.elapsed_time(end) * 1e3 / replays[key].calls)
    return {key: columns(samples[key], replays[key].calls) for key in replays}
