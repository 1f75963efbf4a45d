"""Is the kernel's launch rule near the best launch? Block sizes and warps, by width and rows.

Each configuration is checked against float64 on poisoned outputs, then timed as the other
benchmarks are, without and with programmatic dependent launch. The summary tells, by dtype, width
and launch, how much slower the rule (``gatefuse.kernels.launch_config``) is than the fastest
configuration at the worst number of rows.
"""

from __future__ import annotations

import functools
import json
import math
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import BaseFileLock
from torch import Tensor

from benchmarks.sweep import Row, Run, rotated, sweep
from gatefuse import kernels
from gatefuse.bench.measure import checker
from gatefuse.bench.timing import plan
from gatefuse.bench.workloads import InputSet, bytes_of, make_set
from gatefuse.kernels import LaunchConfig, launch_config

CHECKED = 3  # rows


@dataclass(frozen=True)
class LaunchCase:
    """A unit of work: all configurations at one width, without or with dependent launch."""

    H: int
    rows: tuple[int, ...]
    dtype: str
    pdl: bool


def configurations(case: LaunchCase, N: int) -> Iterator[LaunchConfig]:
    """Chunks, most of which divide the row, and one padded load; 2 to 32 elements a thread. All
    else is as the rule has it."""
    itemsize, H = getattr(torch, case.dtype).itemsize, case.H
    rule = launch_config(N, H, H, itemsize, addend=True, dependent=case.pdl)
    chunks = {c for c in (1024, 2048) if H % 1024 == 0 and c <= H} or {512}
    for block in sorted(chunks | {min(1 << (H - 1).bit_length(), 8192)}):
        for warps in (4, 8, 16):
            if 2 <= block // (32 * warps) <= 32:
                yield rule._replace(block_h=block, block_d=block, num_warps=warps)


def launch(case: LaunchCase, config: LaunchConfig, one: InputSet) -> Tensor:
    module, (x, v, a) = one
    out, pdl = torch.empty_like(x), case.pdl
    kernels.launch(x, module.gate.weight, v, None, a, out, config=config, pdl=pdl, weight_first=pdl)
    return out


def run_case(run: Run, case: LaunchCase, lock: BaseFileLock) -> list[Row]:
    torch.manual_seed(0)
    dtype, rows = getattr(torch, case.dtype), []
    with torch.no_grad():
        one = make_set("add", case.H, CHECKED, dtype, run.device)
        check = checker(*one)
        for N in case.rows:  # compile, while others measure
            for config in configurations(case, N):
                # What the launch leaves unwritten in what it allocates is then NaN.
                poison = [torch.full_like(one[1][0], math.nan) for _ in range(4)]
                del poison
                check([launch(case, config, one)])
        for N in case.rows:
            read, moved = bytes_of("add", case.H, N, dtype)
            number, samples = plan(read, moved, 1, run.device)
            calls = {c: functools.partial(launch, case, c) for c in configurations(case, N)}
            with lock:
                sets = [make_set("add", case.H, N, dtype, run.device) for _ in range(number)]
                timings = rotated(calls, sets, samples, run)
                del sets
                torch.cuda.empty_cache()
            for config, timing in timings.items():
                row = {"H": case.H, "N": N, "dtype": case.dtype, "pdl": case.pdl, "bytes": moved}
                row |= {"block": config.block_h, "warps": config.num_warps}
                row |= {"trigger_first": config.trigger_first, "evict_first": config.evict_first}
                rows.append(row | timing)
    return rows


def summary(rows: list[Row]) -> list[str]:
    lines = []
    rows = [row for row in rows if "error" not in row]
    for dtype, pdl, H in dict.fromkeys((r["dtype"], r["pdl"], r["H"]) for r in rows):
        ratios = {}
        for N in dict.fromkeys(r["N"] for r in rows):
            case = [r for r in rows if (r["dtype"], r["pdl"], r["H"], r["N"]) == (dtype, pdl, H, N)]
            best = min((r["median_us"] for r in case), default=math.nan)
            itemsize = getattr(torch, dtype).itemsize
            rule = launch_config(N, H, H, itemsize, addend=True, dependent=pdl)
            ours = [r for r in case if (r["block"], r["warps"]) == (rule.block_h, rule.num_warps)]
            ratios[N] = min((r["median_us"] for r in ours), default=math.nan) / best
        shown = ", ".join(f"N={N} {ratio:.3f}" for N, ratio in ratios.items())
        lines.append(f"{dtype}{' dependent' if pdl else ''} H={H}: {shown}")
    return lines


def run(args: Namespace, run: Run) -> tuple[Path, int]:
    cases = [
        LaunchCase(H, args.rows, dtype, pdl)
        for dtype in args.dtypes
        for H in args.widths
        for pdl in ((False, True) if kernels.supports_pdl(0) else (False,))
    ]
    path, code = sweep("launch-config", run, cases, functools.partial(run_case, run))
    print("\n".join(summary(json.loads(path.read_text())["rows"])))
    return path, code
