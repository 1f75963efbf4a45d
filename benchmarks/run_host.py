"""What does gatefuse cost the host? Time per call without CUDA graphs, import and compile time.

Run it with nothing else on the machine. Rows of the result file, by ``what``:

- ``call``: host time per call at a size where the host is the bottleneck.
- ``import``: ``import gatefuse`` in a process that has imported torch.
- ``compile``: the first call of a workload in an empty cache and in one that has its code, and
  the part of gatefuse's pass in it.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch._dynamo.config
from torch._inductor.utils import fresh_cache

import gatefuse
from benchmarks.grid import DTYPE, Provider
from benchmarks.sweep import Row, Run
from gatefuse import recording
from gatefuse.bench.cases import providers_of
from gatefuse.bench.measure import checker, compile_provider, function_of, fusion_facts
from gatefuse.bench.timing import columns
from gatefuse.bench.workloads import make_set
from gatefuse.inductor.fusion_pass import GateFusionPass

IMPORT_PROGRAM = """
import time, torch
begin = time.perf_counter()
import gatefuse
print((time.perf_counter() - begin) * 1e3, int(torch.cuda.is_initialized()))
"""


def host_times(
    calls: dict[Provider, Callable[[], Any]], device: str, batch: int = 64, rounds: int = 50
) -> dict[Provider, Row]:
    """Host time per call without CUDA graphs: the wall clock over batches of ``batch`` calls. The
    device is synchronised after each batch, outside the timed region, and a batch is far shorter
    than the launch queue: the host never waits for the device, which is meaningful as long as a
    call takes the device less time than the host."""
    samples: dict[Provider, list[float]] = {key: [] for key in calls}
    gc.disable()
    try:
        for round_ in range(rounds + 2):  # the first two are thrown away
            for key, call in calls.items():
                begin = time.perf_counter()
                for _ in range(batch):
                    call()
                elapsed = time.perf_counter() - begin
                if device == "cuda":
                    torch.cuda.synchronize()
                if round_ >= 2:
                    samples[key].append(elapsed * 1e6 / batch)
    finally:
        gc.enable()
    return {key: columns(samples[key], batch) for key in calls}


def call_rows(
    workload: str, H: int, N: int, modes: Sequence[str], device: str, rounds: int
) -> list[Row]:
    """Of each provider of ``workload``; wrong ones are not timed."""
    torch._dynamo.reset()
    hint = make_set(workload, H, N, getattr(torch, DTYPE), device)
    module, inputs = hint
    check = checker(module, inputs)
    rows: dict[Provider, Row] = {}
    calls: dict[Provider, Callable[[], Any]] = {}
    for provider in providers_of(workload, modes, static=True, device="cuda"):
        if provider.name == "roofline" or provider.draw:
            continue
        run = compile_provider(provider, hint)
        row = {"what": "call", "workload": workload, "provider": provider.name}
        rows[provider] = row | {"mode": provider.mode, "H": H, "N": N, **run.facts}
        try:
            if run.error is not None:
                raise RuntimeError(run.error)
            check(run.function(module, *inputs))
            calls[provider] = functools.partial(run.function, module, *inputs)
        except Exception as error:
            rows[provider]["error"] = str(error)
    for provider, timing in host_times(calls, device, rounds=rounds).items():
        rows[provider] |= timing
    return list(rows.values())


def import_rows(repeats: int) -> list[Row]:
    """Time of ``import gatefuse`` after ``import torch``, each in a new process."""
    times, cuda = [], 0
    for _ in range(repeats + 1):  # the first writes the byte code
        command, root = [sys.executable, "-c", IMPORT_PROGRAM], Path(__file__).parents[1]
        process = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
        milliseconds, initialised = process.stdout.split()
        times.append(float(milliseconds))
        cuda += int(initialised)
    median_ms = round(statistics.median(times[1:]), 2)
    row = {"what": "import", "median_ms": median_ms, "initialises_cuda": bool(cuda)}
    return [row | {"repeats": repeats}]


def compile_rows(workload: str, H: int, N: int, device: str, repeats: int) -> list[Row]:
    """Time of the first call with Inductor alone and with gatefuse, alternately: in an empty
    cache, then, after Dynamo forgot it, in the cache that this filled."""
    providers = [Provider(workload, name, "default") for name in ("inductor", "gatefuse-auto")]
    module, inputs = make_set(workload, H, N, getattr(torch, DTYPE), device)
    samples: dict[tuple[Provider, str], list[tuple[float, float]]] = {}
    facts: dict[Provider, Row] = {}
    for repeat, provider in itertools.product(range(repeats + 1), providers):
        with fresh_cache():
            for cache in ("cold", "warm"):
                torch._dynamo.reset()
                function = function_of(provider)
                with timed_pass() as spent, gatefuse.record() as found:
                    begin = time.perf_counter()
                    function(module, *inputs)
                    if device == "cuda":
                        torch.cuda.synchronize()
                    sample = (time.perf_counter() - begin, sum(spent) * 1e3)
                if repeat > 0:  # the first loads what any compile needs
                    samples.setdefault((provider, cache), []).append(sample)
                elif cache == "cold":
                    try:
                        facts[provider] = fusion_facts(found, provider.gates)
                    except RuntimeError as error:
                        facts[provider] = {"error": f"compile: {error}"[:500]}
    rows = []
    for (provider, cache), of in samples.items():
        seconds, pass_ms = zip(*of)
        row = {"what": "compile", "workload": workload, "provider": provider.name}
        row |= {"mode": provider.mode, "cache": cache, "repeats": repeats, **facts[provider]}
        for name, value in (("median", statistics.median), ("min", min), ("max", max)):
            row[f"{name}_s"] = round(value(seconds), 4)
        rows.append(row | {"pass_ms": round(statistics.median(pass_ms), 3)})
    return rows


@contextlib.contextmanager
def timed_pass() -> Iterator[list[float]]:
    """Yields a list that takes the seconds of each run of gatefuse's pass in the block.

    An open report does not get the text of its graphs: to write it takes many times as long as the
    pass, and a user's compile without a report does not.
    """
    spent: list[float] = []
    plain = GateFusionPass.__call__

    def timed(self: GateFusionPass, graph: torch.fx.Graph) -> None:
        begin = time.perf_counter()
        plain(self, graph)
        spent.append(time.perf_counter() - begin)

    with (
        mock.patch.object(GateFusionPass, "__call__", timed),
        mock.patch.object(recording, "readable", return_value=None),
    ):
        yield spent


def run(args: Namespace, run: Run) -> tuple[Path, int]:
    """Measure all; the most telling first. Returns the result file and an exit code: 1 if a
    provider failed, 2 if the time was over before all was measured."""
    from benchmarks import store

    rounds, imports, repeats = (3, 1, 1) if run.small else (50, 3, 5)
    begin = time.monotonic()
    path = store.new_path(run.out, "host")
    header = store.header(run.device, sys.argv[1:]) | {"quick": run.small}
    rows: list[Row] = []
    store.write(path, {"kind": "host", "header": header, "rows": rows})
    torch._dynamo.config.recompile_limit = 64

    sizes = (args.width, args.rows)
    compiles = functools.partial(compile_rows, device=run.device, repeats=repeats)
    calls = functools.partial(call_rows, modes=args.modes, device=run.device, rounds=rounds)
    works = [functools.partial(import_rows, imports)]
    works += [functools.partial(of, w, *sizes) for of in (compiles, calls) for w in args.workloads]
    with torch.no_grad():
        for done, work in enumerate(works):
            if time.monotonic() - begin > run.time_budget:
                print(f"{len(works) - done} of {len(works)} parts not run", file=sys.stderr)
                return path, 2
            with fresh_cache():
                rows += work()
            store.write(path, {"kind": "host", "header": header, "rows": rows})
            print(f"{time.monotonic() - begin:5.0f} s  {rows[-1]}", file=sys.stderr, flush=True)
    return path, 1 if any("error" in row for row in rows) else 0
