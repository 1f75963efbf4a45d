"""`gatefuse bench`: gatefuse against Inductor on this machine, in one table and one JSON file."""

from __future__ import annotations

import datetime
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from gatefuse.bench.cases import NO_GATE, WORKLOADS, Case
from gatefuse.bench.measure import Row, compile_case, time_providers

SIZES = {"cuda": ((16, 1024, 8192), "bfloat16"), "cpu": ((1, 256), "float32")}
"""Rows, and dtype."""

HEADS = ("Inductor", "gatefuse", "speed-up", "% of roofline", "gate: Inductor", "gatefuse")
LINE = "{:30}{:>10}{:>10}{:>10}{:>15}{:>16}{:>10}"


def rounds_of(device: str, quick: bool) -> int:
    """Samples of each provider; more on the CPU, which has other things to do as well."""
    return 3 if quick else 25 if device == "cuda" else 50


def run(device: str, out: Path, time_budget: float, quick: bool, header: Row) -> tuple[Path, int]:
    """Measure and write until ``time_budget`` seconds are over, and print the table. Returns the
    file, and 1 if a provider failed, 2 if the time was over before all was measured, or 0."""
    begin, longest = time.monotonic(), 0.0
    rows, dtype = SIZES[device]
    sizes = [(N, workload) for N in ((2,) if quick else rows) for workload in WORKLOADS]
    width = 128 if quick else 2048
    cases = [Case(workload, width, (N,), dtype=dtype, device=device) for N, workload in sizes]
    out.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now(datetime.UTC)
    path = out / f"bench-{now:%Y%m%dT%H%M%S}.json"
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    content: dict[str, Any] = {"kind": "workloads" if device == "cuda" else "cpu", "rows": []}
    content["header"] = header | {"device": name, "date": now.isoformat(timespec="seconds")}
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
    print(table(content["rows"]))
    failed = [row for row in content["rows"] if "error" in row]
    for row in failed:
        print(f"{row['workload']} N={row['N']}: {row['provider']} failed: {row['error']}")
    return path, 1 if failed else 2 if content["not_run"] else 0


def table(rows: list[Row]) -> str:
    """Is gatefuse faster here, and by how much: times in µs, the mean of a provider's compiles. The
    roofline is an elementwise op on the same tensors; the last two columns are what the gate costs
    in the glue, with it minus without."""
    times: dict[tuple[Any, ...], dict[str, list[float]]] = {}
    for row in rows:
        of = times.setdefault((row["workload"], row["H"], row["N"], row["dtype"]), {})
        of.setdefault(row["provider"], []).append(row.get("median_us", float("nan")))
    lines = [LINE.format("us", *HEADS)]
    for (workload, H, N, dtype), providers in sorted(times.items()):
        us = {provider: statistics.mean(samples) for provider, samples in providers.items()}
        if workload.endswith(NO_GATE):
            continue
        ours, theirs = us["gatefuse-auto"], us["inductor"]
        share = f"{us['roofline'] / ours * 100:.0f}" if "roofline" in us else ""
        plain = times.get((workload + NO_GATE, H, N, dtype), {}).get("inductor")
        costs = [_number(t - statistics.mean(plain)) if plain else "" for t in (theirs, ours)]
        name, speedup = f"{workload} H={H} N={N} {dtype}", f"{theirs / ours:.2f}x"
        cells = (_number(theirs), _number(ours), speedup, share, *costs)
        lines.append(LINE.format(name, *cells).rstrip())
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
