"""What does gatefuse cost the host? Time per call without CUDA graphs, import and compile time.

    python -m benchmarks.host --out DIR [--chains mul,add,glue] [--width 2048] [--rows 2]
        [--device cuda|cpu] [--quick]

Run it with nothing else on the machine. Rows of the result file, by ``what``:

- ``call``: host time per call at a size where the host is the bottleneck, by chain and arm.
- ``import``: ``import gatefuse`` in a process that has imported torch.
- ``compile``: the first call of a chain in an empty cache, and the share of gatefuse's pass in it.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch._dynamo.config
from torch._inductor.utils import fresh_cache

from benchmarks import results
from benchmarks.chains import make_set
from benchmarks.core import Arm, Reference, arms_of, compile_arm
from benchmarks.grid import DTYPE, FAMILIES
from benchmarks.timing import host_times
from gatefuse.fusion_pass import GateFusionPass

IMPORT_PROGRAM = """
import time, torch
begin = time.perf_counter()
import gatefuse
print((time.perf_counter() - begin) * 1e3, int(torch.cuda.is_initialized()))
"""


def call_rows(chain: str, H: int, N: int, device: str, rounds: int) -> list[dict[str, Any]]:
    """Host time per call of each arm of ``chain`` in default mode; wrong arms are not timed."""
    torch._dynamo.reset()
    hint = make_set(chain, H, N, getattr(torch, DTYPE), device)
    module, inputs = hint
    reference = Reference.of(module, inputs)
    rows, calls = {}, {}
    for arm in arms_of(chain, ("default",), static=True):
        if arm.name == "limit":
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
        calls[arm] = lambda function=run.function: function(module, *inputs)
    for arm, timing in host_times(calls, device, rounds=rounds).items():
        rows[arm] |= {key: round(value, 3) for key, value in asdict(timing).items()}
    return list(rows.values())


def import_row(repeats: int) -> dict[str, Any]:
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


def compile_rows(chain: str, H: int, N: int, device: str, repeats: int) -> list[dict[str, Any]]:
    """Time of the first call with Inductor alone and with gatefuse, alternately."""
    arms = [Arm(chain, "inductor", "default"), Arm(chain, "gatefuse-auto", "default")]
    module, inputs = make_set(chain, H, N, getattr(torch, DTYPE), device)
    seconds: dict[Arm, list[float]] = {arm: [] for arm in arms}
    pass_ms: list[float] = []
    for repeat in range(repeats + 1):  # the first loads what any compile needs
        for arm in arms:
            torch._dynamo.reset()
            function = arm.callable(dynamic=False)
            with fresh_cache(), timed_pass() as spent:
                begin = time.perf_counter()
                function(module, *inputs)
                if device == "cuda":
                    torch.cuda.synchronize()
                elapsed = time.perf_counter() - begin
            if repeat > 0:
                seconds[arm].append(elapsed)
                pass_ms += [sum(spent) * 1e3] if arm.name == "gatefuse-auto" else []
    return [
        {
            "what": "compile",
            "chain": chain,
            "arm": arm.name,
            "median_s": round(statistics.median(seconds[arm]), 4),
            "min_s": round(min(seconds[arm]), 4),
            "pass_ms": round(statistics.median(pass_ms), 3) if arm == arms[1] else 0.0,
            "repeats": repeats,
        }
        for arm in arms
    ]


@contextlib.contextmanager
def timed_pass() -> Iterator[list[float]]:
    """Yields a list that takes the seconds of each run of gatefuse's pass in the block."""
    spent: list[float] = []
    plain = GateFusionPass.__call__

    def timed(self: GateFusionPass, graph: torch.fx.Graph) -> None:
        begin = time.perf_counter()
        plain(self, graph)
        spent.append(time.perf_counter() - begin)

    GateFusionPass.__call__ = timed  # type: ignore[method-assign]
    try:
        yield spent
    finally:
        GateFusionPass.__call__ = plain  # type: ignore[method-assign]


def main(arguments: list[str]) -> int:
    """Returns 1 if an arm failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.host",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--chains", type=lambda text: text.split(","), default=list(FAMILIES))
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="few repeats: does it run?")
    args = parser.parse_args(arguments)

    path = results.new_path(args.out, "host")
    rows: list[dict[str, Any]] = []
    content = {"kind": "host", "header": results.header(args.device, arguments), "rows": rows}
    torch._dynamo.config.recompile_limit = 64
    with torch.no_grad():
        for chain in args.chains:
            with fresh_cache():
                rows += call_rows(
                    chain, args.width, args.rows, args.device, 3 if args.quick else 50
                )
            results.write(path, content)
        rows.append(import_row(1 if args.quick else 3))
        results.write(path, content)
        for chain in args.chains:
            rows += compile_rows(chain, args.width, args.rows, args.device, 1 if args.quick else 3)
            results.write(path, content)
    for row in rows:
        print({key: value for key, value in row.items() if key not in ("p10_us", "p90_us")})
    return 1 if any("error" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
