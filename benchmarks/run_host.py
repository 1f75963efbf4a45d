"""What does gatefuse cost the host? Time per call without CUDA graphs, import and compile time.

Run it with nothing else on the machine. Rows of the result file, by ``what``:

- ``call``: host time per call at a size where the host is the bottleneck, by chain, arm and mode.
- ``import``: ``import gatefuse`` in a process that has imported torch.
- ``compile``: the first call of a chain in an empty cache and in one that holds its code, and the
  part of gatefuse's pass in it.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch._dynamo.config
from torch._inductor.utils import fresh_cache

from benchmarks import store as results
from benchmarks.grid import DTYPE, Arm, arms_of
from benchmarks.run_workloads import Reference, columns, compile_arm, function_of
from benchmarks.store import Row
from gatefuse import report
from gatefuse.bench.timing import host_times
from gatefuse.bench.workloads import make_set
from gatefuse.inductor.fusion_pass import GateFusionPass

IMPORT_PROGRAM = """
import time, torch
begin = time.perf_counter()
import gatefuse
print((time.perf_counter() - begin) * 1e3, int(torch.cuda.is_initialized()))
"""


def call_rows(
    chain: str, H: int, N: int, modes: Sequence[str], device: str, rounds: int
) -> list[Row]:
    """Host time per call of each arm of ``chain``; wrong arms are not timed."""
    torch._dynamo.reset()
    hint = make_set(chain, H, N, getattr(torch, DTYPE), device)
    module, inputs = hint
    reference = Reference.of(module, inputs)
    rows: dict[Arm, Row] = {}
    calls: dict[Arm, Callable[[], Any]] = {}
    for arm in arms_of(chain, modes, static=True):
        if arm.name == "limit" or arm.draw:
            continue
        run = compile_arm(arm, "static", hint, hint)
        rows[arm] = {"what": "call", "chain": chain, "arm": arm.name, "mode": arm.mode}
        rows[arm] |= {"H": H, "N": N, **run.facts}
        try:
            if run.error is not None:
                raise RuntimeError(run.error)
            reference.check(run.function(module, *inputs))
        except Exception as error:
            rows[arm]["error"] = str(error)
            continue

        def call(function: Callable[..., Any] = run.function) -> Any:
            return function(module, *inputs)

        calls[arm] = call
    for arm, timing in host_times(calls, device, rounds=rounds).items():
        rows[arm] |= columns(timing)
    return list(rows.values())


def import_row(repeats: int) -> Row:
    """Time of ``import gatefuse`` after ``import torch``, each in a new process."""
    times, cuda = [], 0
    for _ in range(repeats + 1):  # the first writes the byte code
        process = subprocess.run(
            [sys.executable, "-c", IMPORT_PROGRAM],
            capture_output=True,
            text=True,
            check=True,
            cwd=results.ROOT,
        )
        milliseconds, initialised = process.stdout.split()
        times.append(float(milliseconds))
        cuda += int(initialised)
    return {
        "what": "import",
        "median_ms": round(statistics.median(times[1:]), 2),
        "initialises_cuda": bool(cuda),
        "repeats": repeats,
    }


def compile_rows(chain: str, H: int, N: int, device: str, repeats: int) -> list[Row]:
    """Time of the first call with Inductor alone and with gatefuse, alternately: in an empty
    cache, then, after Dynamo forgot it, in the cache that this filled."""
    arms = [Arm(chain, "inductor", "default"), Arm(chain, "gatefuse-auto", "default")]
    module, inputs = make_set(chain, H, N, getattr(torch, DTYPE), device)
    seconds: dict[tuple[Arm, str], list[float]] = {}
    pass_ms: dict[tuple[Arm, str], list[float]] = {}
    for repeat in range(repeats + 1):  # the first loads what any compile needs
        for arm in arms:
            with fresh_cache():
                for cache in ("cold", "warm"):
                    torch._dynamo.reset()
                    function = function_of(arm, dynamic=False)
                    with timed_pass() as spent:
                        begin = time.perf_counter()
                        function(module, *inputs)
                        if device == "cuda":
                            torch.cuda.synchronize()
                        elapsed = time.perf_counter() - begin
                    if repeat > 0:
                        seconds.setdefault((arm, cache), []).append(elapsed)
                        pass_ms.setdefault((arm, cache), []).append(sum(spent) * 1e3)
    return [
        {
            "what": "compile",
            "chain": chain,
            "arm": arm.name,
            "mode": arm.mode,
            "cache": cache,
            "median_s": round(statistics.median(times), 4),
            "min_s": round(min(times), 4),
            "max_s": round(max(times), 4),
            "pass_ms": round(statistics.median(pass_ms[arm, cache]), 3),
            "repeats": repeats,
        }
        for (arm, cache), times in seconds.items()
    ]


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
        mock.patch.object(report, "readable", return_value=None),
    ):
        yield spent


@dataclass(frozen=True)
class Repeats:
    """How often each is measured: rounds of calls, imports, compiles."""

    calls: int = 50
    imports: int = 3
    compiles: int = 5


def run(
    chains: Sequence[str],
    H: int,
    N: int,
    modes: Sequence[str],
    device: str,
    out: Path,
    repeats: Repeats,
    time_budget: float,
) -> tuple[Path, int]:
    """Measure all; the most telling first. Returns the result file and an exit code: 1 if an arm
    failed, 2 if the time was over before all was measured."""
    begin = time.monotonic()
    path = results.new_path(out, "host")
    rows: list[Row] = []
    header = results.header(device, sys.argv[1:])
    content = {"kind": "host", "header": header, "rows": rows}
    results.write(path, content)
    torch._dynamo.config.recompile_limit = 64

    def calls(chain: str) -> list[Row]:
        with fresh_cache():
            return call_rows(chain, H, N, modes, device, repeats.calls)

    def compiles(chain: str) -> list[Row]:
        return compile_rows(chain, H, N, device, repeats.compiles)

    works: list[Callable[[], list[Row]]] = [lambda: [import_row(repeats.imports)]]
    works += [functools.partial(work, chain) for work in (compiles, calls) for chain in chains]
    with torch.no_grad():
        for done, work in enumerate(works):
            if time.monotonic() - begin > time_budget:
                print(f"{len(works) - done} of {len(works)} parts not run", file=sys.stderr)
                return path, 2
            rows += work()
            results.write(path, content)
            print(f"{time.monotonic() - begin:5.0f} s  {rows[-1]}", file=sys.stderr, flush=True)
    return path, 1 if any("error" in row for row in rows) else 0
