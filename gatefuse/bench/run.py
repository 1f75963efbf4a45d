"""`gatefuse bench`: gatefuse against Inductor on this machine, in one table and one JSON file."""

from __future__ import annotations

import datetime
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gatefuse.bench.cases import LEAST_TRAFFIC, NO_GATE, TRAINING, WORKLOADS, BenchError, Case
from gatefuse.bench.measure import Row, compile_case, time_providers

SIZES = {"cuda": ((16, 1024, 8192), "bfloat16"), "cpu": ((1, 256), "float32")}
"""Rows, and dtype."""

HEADS = ("speed-up", "% of roofline", "gate: Inductor", "gatefuse")
TIMES, LINE = "{:30}{:>22}{:>22}", "{:>10}{:>15}{:>16}{:>10}"
KEY = "Times: median (10th..90th percentile). noise: the difference is smaller than this spread."
TOY = "Toy sizes: they show that all runs and is right, and nothing about speed."


def device_of(asked: str | None) -> str:
    """The device to measure on: ``asked``, or the GPU if there is one. BenchError if ``asked`` is
    not there."""
    if asked == "cuda" and not torch.cuda.is_available():
        raise BenchError("PyTorch finds no CUDA device here")
    return asked or ("cuda" if torch.cuda.is_available() else "cpu")


def rounds_of(device: str, quick: bool) -> int:
    """Samples of each provider; more on the CPU, which has other things to do as well."""
    return 3 if quick else 25 if device == "cuda" else 50


def run(
    device: str,
    out: Path,
    time_budget: float,
    quick: bool,
    header: Row,
    training: bool = False,
) -> tuple[Path, int]:
    """Measure and write until ``time_budget`` seconds are over, and print the table. Returns the
    file, and 1 if a provider failed, 2 if the time was over before all was measured, or 0. Raises
    BenchError if nothing can be written to ``out``."""
    begin, longest = time.monotonic(), 0.0
    rows, dtype = SIZES[device]
    workloads = [name + TRAINING for name in WORKLOADS] if training else WORKLOADS
    sizes = [(N, workload) for N in ((2,) if quick else rows) for workload in workloads]
    width = 128 if quick else 2048
    cases = [Case(workload, width, (N,), dtype=dtype, device=device) for N, workload in sizes]
    now = datetime.datetime.now(datetime.UTC)
    path = out / f"bench-{now:%Y%m%dT%H%M%S}.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
        path.touch()  # rather now than after two minutes
    except OSError as e:
        raise BenchError(f"{path} cannot be written: {e.strerror}; --out names a folder") from None
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    content: dict[str, Any] = {"kind": "workloads" if device == "cuda" else "cpu", "rows": []}
    content["header"] = header | {"device": name, "date": now.isoformat(timespec="seconds")}
    content["header"]["quick"] = quick
    content["not_run"] = [str(case) for case in cases]
    for case in cases:
        started = time.monotonic()
        if started + longest > begin + time_budget:
            break
        with torch.no_grad():
            (N,) = case.rows
            runs = compile_case(case, N)
            content["rows"] += time_providers(runs, N, case, rounds_of(device, quick))
        content["not_run"].remove(str(case))
        longest = max(longest, time.monotonic() - started)
        print(f"{time.monotonic() - begin:5.0f} s  {case}", file=sys.stderr, flush=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    if content["rows"]:
        print(table(content["rows"], compared=not quick))
        print(TOY if quick else KEY)
    if left := len(content["not_run"]):
        what = f"{left} of {len(cases)} cases were not" if content["rows"] else "Nothing was"
        print(f"{what} measured: the {time_budget:g} s of --time-budget were over.")
    failed = [row for row in content["rows"] if "error" in row]
    for row in failed:
        print(f"{row['workload']} N={row['N']}: {row['provider']} failed: {row['error']}")
    return path, 1 if failed else 2 if content["not_run"] else 0


class Time(NamedTuple):
    """µs: the mean of a provider's compiles, and the range of their samples' 10th and 90th
    percentiles. NaN if one failed."""

    us: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.us):
            return "failed"
        return f"{_number(self.us)} ({_number(self.low)}..{_number(self.high)})"


FAILED = Time(math.nan, math.nan, math.nan)


def _time(rows: list[Row]) -> Time:
    if any("error" in row for row in rows):
        return FAILED
    median, low, high = ([row[f"{name}_us"] for row in rows] for name in ("median", "p10", "p90"))
    return Time(statistics.mean(median), min(low), max(high))


def _compared(a: Time, b: Time, text: str) -> str:
    """The text that compares two times, unless they differ by less than the larger spread."""
    if math.isnan(a.us + b.us):
        return ""
    spread = max(a.high - a.low, b.high - b.low)
    return text if abs(a.us - b.us) > spread else "noise"


def table(rows: list[Row], compared: bool = True) -> str:
    """Is gatefuse faster here, and by how much: times in µs, with their spread. The roofline is an
    elementwise op on the same tensors; the last two columns are what the gate costs in the glue,
    with it minus without. Without ``compared``: the times alone, where sizes are toys."""
    times: dict[tuple[Any, ...], dict[str, list[Row]]] = {}
    for row in rows:
        of = times.setdefault((row["workload"], row["H"], row["N"], row["dtype"]), {})
        of.setdefault(row["provider"], []).append(row)
    heads = LINE.format(*HEADS) if compared else ""
    lines = [TIMES.format("us", "Inductor", "gatefuse") + heads]
    for (workload, H, N, dtype), providers in sorted(times.items()):
        if workload.endswith(NO_GATE):
            continue
        us = {provider: _time(samples) for provider, samples in providers.items()}
        ours, theirs = us["gatefuse-auto"], us["inductor"]
        line = TIMES.format(f"{workload} H={H} N={N} {dtype}", str(theirs), str(ours))
        if compared:
            speedup = _compared(theirs, ours, f"{theirs.us / ours.us:.2f}x")
            floor = us.get("roofline", FAILED).us / ours.us * 100 * LEAST_TRAFFIC.get(workload, 1)
            share = "" if math.isnan(floor) else f"{floor:.0f}"
            plain = times.get((workload + NO_GATE, H, N, dtype), {}).get("inductor")
            without = _time(plain) if plain else None
            costs = [
                _compared(t, without, _number(t.us - without.us)) if without else ""
                for t in (theirs, ours)
            ]
            line += LINE.format(speedup, share, *costs)
        lines.append(line.rstrip())
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
