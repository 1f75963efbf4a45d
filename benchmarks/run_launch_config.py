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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.run_workloads import release_memory
from benchmarks.store import Row
from benchmarks.sweep import Setting, sweep
from benchmarks.workers import DeviceLock
from gatefuse import kernels
from gatefuse.bench.timing import Replay, interleaved, plan
from gatefuse.kernels import LaunchConfig, launch_config


@dataclass(frozen=True)
class RuleCell:
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


def variants(cell: RuleCell, N: int) -> list[LaunchConfig]:
    """The configurations, and all else as the rule has it."""
    itemsize = getattr(torch, cell.dtype).itemsize
    rule = launch_config(N, cell.H, cell.H, itemsize, addend=True, dependent=cell.pdl)
    return [
        config._replace(trigger_first=rule.trigger_first, evict_first=rule.evict_first)
        for config in configurations(cell.H)
    ]


def run_cell(setting: Setting, cell: RuleCell, lock: DeviceLock) -> list[Row]:
    """A result row for each configuration and number of rows."""
    torch.manual_seed(setting.seed)
    for N in cell.rows:  # compile, while others measure
        for config in variants(cell, N):
            check(cell, config, setting.device)
    rows: list[Row] = []
    for N in cell.rows:
        with lock:
            rows += measure(cell, N, setting)
            release_memory(setting.device)
    return rows


def _make(cell: RuleCell, device: str, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=device).to(getattr(torch, cell.dtype))


def check(cell: RuleCell, config: LaunchConfig, device: str) -> None:
    """Raise AssertionError unless the kernel is right in this configuration."""
    x, v, a = (_make(cell, device, 3, cell.H) for _ in range(3))
    weight = _make(cell, device, 1, cell.H) / cell.H**0.5
    out = torch.full_like(x, math.nan)
    kernels.launch(x, weight, v, None, a, out, config=config, pdl=cell.pdl, weight_first=cell.pdl)
    reference = torch.sigmoid(x.double() @ weight.double().T) * v.double() + a.double()
    eager = a + torch.sigmoid(x @ weight.T) * v
    allowed = 2 * (eager.double() - reference).norm()
    allowed += torch.finfo(x.dtype).eps * reference.norm()
    if not (out.double() - reference).norm() <= allowed:
        raise AssertionError(f"{config} is wrong: {cell}")


def measure(cell: RuleCell, N: int, setting: Setting) -> list[Row]:
    """One result row for each configuration."""
    H, dtype, device = cell.H, getattr(torch, cell.dtype), setting.device
    moved = 4 * N * H * dtype.itemsize
    planned = plan(moved * 3 // 4, moved, 1, device)
    sets = [
        (*(_make(cell, device, N, H) for _ in range(3)), _make(cell, device, 1, H) / H**0.5)
        for _ in range(planned.sets)
    ]
    pool = torch.cuda.graph_pool_handle() if device == "cuda" else None
    replays: dict[LaunchConfig, Replay] = {}
    for config in variants(cell, N):

        def call(i: int, config: LaunchConfig = config) -> tuple[torch.Tensor, ...]:
            x, v, a, weight = sets[i % len(sets)]
            out = torch.empty_like(x)
            kernels.launch(
                x, weight, v, None, a, out, config=config, pdl=cell.pdl, weight_first=cell.pdl
            )
            return (out,)

        replays[config] = Replay(call, planned.calls, device, pool)
    return [
        {
            "H": H,
            "N": N,
            "dtype": cell.dtype,
            "block": config.block_h,
            "warps": config.num_warps,
            "pdl": cell.pdl,
            "trigger_first": config.trigger_first,
            "evict_first": config.evict_first,
            "median_us": round(timing.median_us, 4),
            "p10_us": round(timing.p10_us, 4),
            "p90_us": round(timing.p90_us, 4),
            "bytes": moved,
        }
        for config, timing in interleaved(replays, setting.rounds, device).items()
    ]


def failed_rows(cell: RuleCell, error: str) -> list[Row]:
    """The rows of a cell whose process died."""
    return [{"H": cell.H, "dtype": cell.dtype, "pdl": cell.pdl, "error": error}]


def summary(rows: list[Row]) -> list[str]:
    """The rule against the fastest configuration, by dtype, launch and width."""
    lines = []
    rows = [row for row in rows if "error" not in row]
    for dtype, pdl, H in dict.fromkeys((r["dtype"], r["pdl"], r["H"]) for r in rows):
        ratios = {}
        for N in dict.fromkeys(r["N"] for r in rows):
            cell = [r for r in rows if (r["dtype"], r["pdl"], r["H"], r["N"]) == (dtype, pdl, H, N)]
            best = min((r["median_us"] for r in cell), default=math.nan)
            itemsize = getattr(torch, dtype).itemsize
            rule = launch_config(N, H, H, itemsize, addend=True, dependent=pdl)
            ours = [r for r in cell if (r["block"], r["warps"]) == (rule.block_h, rule.num_warps)]
            ratios[N] = min((r["median_us"] for r in ours), default=math.nan) / best
        shown = ", ".join(f"N={N} {ratio:.3f}" for N, ratio in ratios.items())
        lines.append(f"{dtype}{' dependent' if pdl else ''} H={H}: {shown}")
    return lines


def run(
    widths: Sequence[int],
    rows: Sequence[int],
    dtypes: Sequence[str],
    setting: Setting,
    out: Path,
    processes: int,
    time_budget: float,
) -> tuple[Path, int]:
    """Measure all; see :func:`benchmarks.sweep.sweep`."""
    cells = [
        RuleCell(H, tuple(rows), dtype, pdl)
        for dtype in dtypes
        for H in widths
        for pdl in ((False, True) if kernels.supports_pdl(0) else (False,))
    ]
    work = functools.partial(run_cell, setting)
    path, code = sweep(
        "launch-rule", setting.device, cells, work, failed_rows, out, processes, time_budget
    )
    print("\n".join(summary(json.loads(path.read_text())["rows"])))
    return path, code
