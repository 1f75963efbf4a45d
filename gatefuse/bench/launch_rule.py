"""Is the kernel's launch rule near the best launch? All block sizes and warps, by width and dtype.

Each configuration is checked against float64 on poisoned outputs, then timed as the other
benchmarks are, without and with programmatic dependent launch. The summary tells, by width and
dtype, how much slower the rule (``gatefuse.kernels.launch_config``) is than the fastest
configuration: the geometric mean over rows and launches.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from gatefuse import kernels
from gatefuse.bench import results
from gatefuse.bench.timing import Replay, interleaved, plan
from gatefuse.kernels import LaunchConfig


def configurations(width: int) -> Iterator[LaunchConfig]:
    """Chunks that divide the row, and one padded load; 2 to 32 elements a thread."""
    chunks = {c for c in (512, 1024, 2048) if width % c == 0}
    for block in sorted(chunks | {1 << (width - 1).bit_length()}):
        for warps in (1, 2, 4, 8, 16):
            if 2 <= block // (32 * warps) <= 32:
                yield LaunchConfig(block, block, warps)


def measure(width: int, rows: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """One result row for each configuration, without and with dependent launch."""

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda").to(dtype)

    weight = (make(1, width).float() / width**0.5).to(dtype)
    moved = 4 * rows * width * dtype.itemsize
    planned = plan(moved * 3 // 4, moved, 1, "cuda")
    sets = [(make(rows, width), make(rows, width), make(rows, width)) for _ in range(planned.sets)]
    outputs = [torch.empty_like(x) for x, _, _ in sets]
    x, v, a = sets[0]
    gate = torch.sigmoid(x.double() @ weight.double().T)
    reference = gate * v.double() + a.double()
    eager = a + torch.sigmoid(x @ weight.T) * v
    allowed = 2 * (eager.double() - reference).norm() + torch.finfo(dtype).eps * reference.norm()
    replays = {}
    for config in configurations(width):
        for pdl in (False, True) if kernels.supports_pdl(0) else (False,):

            def call(
                i: int, config: LaunchConfig = config, pdl: bool = pdl
            ) -> tuple[torch.Tensor, ...]:
                x, v, a = sets[i % len(sets)]
                out = outputs[i % len(sets)]
                kernels.launch(x, weight, None, v, a, out, config=config, pdl=pdl, weight_first=pdl)
                return (out,)

            outputs[0].fill_(math.nan)
            call(0)
            if not (outputs[0].double() - reference).norm() <= allowed:
                raise AssertionError(f"{config} is wrong at width {width}, {rows} rows, {dtype}")
            replays[config, pdl] = Replay(call, planned.calls, "cuda", None)
    rule = kernels.launch_config(width, width)
    return [
        {
            "H": width,
            "N": rows,
            "dtype": str(dtype).removeprefix("torch."),
            "block": config.block_h,
            "warps": config.num_warps,
            "pdl": pdl,
            "rule": config == rule,
            "median_us": round(timing.median_us, 4),
            "p10_us": round(timing.p10_us, 4),
            "p90_us": round(timing.p90_us, 4),
            "bytes": moved,
        }
        for (config, pdl), timing in interleaved(replays, 15, "cuda").items()
    ]


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """The rule against the fastest configuration, by dtype and width."""
    lines = []
    for dtype, width in dict.fromkeys((r["dtype"], r["H"]) for r in rows):
        logs = []
        ours = [r for r in rows if (r["dtype"], r["H"]) == (dtype, width)]
        for n, pdl in dict.fromkeys((r["N"], r["pdl"]) for r in ours):
            cell = [r for r in ours if (r["N"], r["pdl"]) == (n, pdl)]
            times = [r["median_us"] for r in cell if r["rule"]]
            logs += [math.log(t / min(r["median_us"] for r in cell)) for t in times]
        shown = f"{math.exp(sum(logs) / len(logs)):.3f}" if logs else "rule not among them"
        lines.append(f"{dtype} H={width}: {shown}")
    return lines


def run(
    widths: Sequence[int],
    rows: Sequence[int],
    dtypes: Sequence[str],
    out: Path,
    time_budget: float,
) -> tuple[Path, int]:
    """Returns the result file and an exit code: 2 if the time was over before all was measured."""
    begin = time.monotonic()
    path = results.new_path(out, "launch-rule")
    measured: list[dict[str, Any]] = []
    header = results.header("cuda", sys.argv[1:])
    content = {"kind": "launch-rule", "header": header, "rows": measured}
    results.write(path, content)
    code = 0
    with torch.no_grad():
        for dtype in dtypes:
            for width in widths:
                for n in rows:
                    if time.monotonic() - begin > time_budget:
                        code = 2
                        continue
                    measured += measure(width, n, getattr(torch, dtype))
                    results.write(path, content)
    print("\n".join(summary(measured)))
    return path, code
