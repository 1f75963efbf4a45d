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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import BaseFileLock

from benchmarks.sweep import Row, Run, rotated, sweep
from gatefuse import kernels
from gatefuse.bench.timing import plan
from gatefuse.kernels import LaunchConfig, launch_config


@dataclass(frozen=True)
class LaunchCase:
    """A unit of work: all configurations at one width, without or with dependent launch."""

    H: int
    rows: tuple[int, ...]
    dtype: str
    pdl: bool


def configurations(width: int) -> Iterator[LaunchConfig]:
    """Chunks, most of which divide the row, and one padded load; 2 to 32 elements a thread."""
    chunks = {c for c in (1024, 2048) if width % 1024 == 0 and c <= width} or {512}
    for block in sorted(chunks | {min(1 << (width - 1).bit_length(), 8192)}):
        for warps in (4, 8, 16):
            if 2 <= block // (32 * warps) <= 32:
                yield LaunchConfig(block, block, warps)


def variants(case: LaunchCase, N: int) -> list[LaunchConfig]:
    """The configurations, and all else as the rule has it."""
    itemsize = getattr(torch, case.dtype).itemsize
    rule = launch_config(N, case.H, case.H, itemsize, addend=True, dependent=case.pdl)
    return [
        config._replace(trigger_first=rule.trigger_first, evict_first=rule.evict_first)
        for config in configurations(case.H)
    ]


def run_case(run: Run, case: LaunchCase, lock: BaseFileLock) -> list[Row]:
    """A result row for each configuration and number of rows."""
    torch.manual_seed(0)
    for N in case.rows:  # compile, while others measure
        for config in variants(case, N):
            check(case, config, run.device)
    rows: list[Row] = []
    for N in case.rows:
        with lock:
            rows += measure(case, N, run)
            torch.cuda.empty_cache()
    return rows


def _make(case: LaunchCase, device: str, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=device).to(getattr(torch, case.dtype))


def check(case: LaunchCase, config: LaunchConfig, device: str) -> None:
    """Raise AssertionError unless the kernel is right in this configuration."""
    x, v, a = (_make(case, device, 3, case.H) for _ in range(3))
    weight = _make(case, device, 1, case.H) / case.H**0.5
    out = torch.full_like(x, math.nan)
    kernels.launch(x, weight, v, None, a, out, config=config, pdl=case.pdl, weight_first=case.pdl)
    reference = torch.sigmoid(x.double() @ weight.double().T) * v.double() + a.double()
    eager = a + torch.sigmoid(x @ weight.T) * v
    allowed = 2 * (eager.double() - reference).norm()
    allowed += torch.finfo(x.dtype).eps * reference.norm()
    if not (out.double() - reference).norm() <= allowed:
        raise AssertionError(f"{config} is wrong: {case}")


def measure(case: LaunchCase, N: int, run: Run) -> list[Row]:
    """One result row for each configuration."""
    H, dtype, device = case.H, getattr(torch, case.dtype), run.device
    moved = 4 * N * H * dtype.itemsize
    planned = plan(moved * 3 // 4, moved, 1, device)
    sets = [
        (*(_make(case, device, N, H) for _ in range(3)), _make(case, device, 1, H) / H**0.5)
        for _ in range(planned[0])
    ]

    def call_of(config: LaunchConfig) -> Callable[[tuple[torch.Tensor, ...]], torch.Tensor]:
        def call(one: tuple[torch.Tensor, ...]) -> torch.Tensor:
            x, v, a, weight = one
            out, pdl = torch.empty_like(x), case.pdl
            kernels.launch(x, weight, v, None, a, out, config=config, pdl=pdl, weight_first=pdl)
            return out

        return call

    calls = {config: call_of(config) for config in variants(case, N)}
    return [
        {
            "H": H,
            "N": N,
            "dtype": case.dtype,
            "block": config.block_h,
            "warps": config.num_warps,
            "pdl": case.pdl,
            "trigger_first": config.trigger_first,
            "evict_first": config.evict_first,
            "bytes": moved,
            **timing,
        }
        for config, timing in rotated(calls, sets, planned[1], run).items()
    ]


def failed_rows(case: LaunchCase, error: str) -> list[Row]:
    """The rows of a case whose process died."""
    return [{"H": case.H, "dtype": case.dtype, "pdl": case.pdl, "error": error}]


def summary(rows: list[Row]) -> list[str]:
    """The rule against the fastest configuration, by dtype, launch and width."""
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


def run(
    widths: Sequence[int], rows: Sequence[int], dtypes: Sequence[str], run: Run
) -> tuple[Path, int]:
    """Measure all; see :func:`benchmarks.sweep.sweep`."""
    cases = [
        LaunchCase(H, tuple(rows), dtype, pdl)
        for dtype in dtypes
        for H in widths
        for pdl in ((False, True) if kernels.supports_pdl(0) else (False,))
    ]
    work = functools.partial(run_case, run)
    path, code = sweep("launch-config", run, cases, work, failed_rows)
    print("\n".join(summary(json.loads(path.read_text())["rows"])))
    return path, code
