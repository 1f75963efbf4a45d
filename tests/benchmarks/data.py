"""Made-up results of complete runs that reach every threshold, for the tests to break."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import grid

HEADER = {"device": "a GPU, 1", "torch": "2", "triton": None, "date": "2026-01-01T00:00:00"}
STATIC = {"shapes": "static", "H": 4096, "dtype": "bfloat16"}
AUTO = {"provider": "gatefuse-auto", "mode": "default"}


def workload_rows(cases: list[grid.Case]) -> list[dict[str, Any]]:
    """Rows of a complete run."""
    rows = []
    for key, provider in grid.measured(cases):
        us = {"eager": 9.0, "roofline": 1.0, "op": 1.0, "inductor": 5.0}.get(provider.name, 2.0)
        us = 1.5 if provider.workload.endswith(grid.NO_GATE) else us
        row = {**key._asdict(), "provider": provider.name, "mode": provider.mode}
        row |= {"draw": provider.draw}
        row |= {"median_us": us, "p10_us": us - 0.1, "p90_us": us + 0.1, "bytes": 4000}
        row |= {"peak_bytes": 1000}
        if grid.is_hot(key):
            row |= {f"hot_{name}": row[name] for name in ("median_us", "p10_us", "p90_us")}
        rows.append(row)
    return rows


def module_rows() -> list[dict[str, Any]]:
    return [
        {"model": case.model, "part": case.part, "tokens": case.tokens, "provider": provider}
        | {"mode": case.mode, "kernels": kernels, "compile_s": 10.0, "pass_ms": 20.0}
        | {"median_us": us, "p10_us": us, "p90_us": us}
        for case in grid.module_cases()
        for provider, kernels, us in (("inductor", 20, 100.0), ("gatefuse-auto", 17, 98.0))
    ]


def sglang_rows() -> list[dict[str, Any]]:
    return [
        {"workload": workload, "H": 4096, "N": N, "provider": provider, "median_us": us}
        for workload in ("mul", "add")
        for N in (1, 1024)
        for provider, us in (("op", 1.2), ("sglang", 1.15), ("roofline", 1.1))
    ]


def host_rows() -> list[dict[str, Any]]:
    call_row = {"what": "call", "workload": "mul", "mode": "default", "H": 2048, "N": 2}
    compiled = {"what": "compile", "workload": "mul", "mode": "default", "cache": "cold"}
    return [
        {**call_row, "provider": "inductor", "median_us": 60.0, "p10_us": 59.0, "p90_us": 61.0},
        {
            **call_row,
            "provider": "gatefuse-auto",
            "median_us": 46.0,
            "p10_us": 45.0,
            "p90_us": 47.0,
        },
        {"what": "import", "median_ms": 12.0, "initialises_cuda": False},
        {**compiled, "provider": "inductor", "median_s": 1.0, "pass_ms": 0.0},
        {**compiled, "provider": "gatefuse-auto", "median_s": 1.0, "pass_ms": 9.0},
        {**compiled, "provider": "gatefuse-auto", "median_s": 0.1, "pass_ms": 0.0, "cache": "warm"},
    ]


def files() -> list[dict[str, Any]]:
    """Contents of a file of each kind."""
    gpu = [case for name, one in grid.GRIDS.items() if name != "cpu" for case in one.cases()]
    rows = {
        "workloads": workload_rows(gpu),
        "host": host_rows(),
        "cpu": workload_rows(grid.GRIDS["cpu"].cases()),
        "modules": module_rows(),
        "sglang": sglang_rows(),
    }
    return [{"kind": kind, "header": HEADER, "rows": found} for kind, found in rows.items()]


def edit(contents: list[dict[str, Any]], change: dict[str, Any], **where: Any) -> None:
    """Apply ``change`` to the rows that have the values ``where``; there must be some."""
    found = [
        row
        for content in contents
        for row in content["rows"]
        if all(row.get(name) == value for name, value in where.items())
    ]
    assert found
    for row in found:
        row.update(change)


def engine_file() -> dict[str, Any]:
    """Two layers; the kernels of a step of each provider, as (kernel, calls, µs). Long names are
    cut off, and two kernels may end up with the same one."""
    norm, fused = ("triton_norm", 2, 8.0), ("triton_norm_gate", 2, 9.0)
    experts = [("experts", 1, 45.0), ("experts", 1, 45.0)]
    kernels = {
        "vllm": [("gemv", 2, 10.0), ("sigmoid", 2, 4.0), norm, *experts],
        "plugin": [fused, ("experts", 2, 88.0)],
        "hand-kernel": [("op", 2, 5.0), norm, ("experts", 2, 91.0)],
    }
    rows = [
        {
            "provider": provider,
            "name": "decode-16",
            "seconds": [1.0],
            "repeats": 2,
            "new_tokens_per_s": speed,
            "spread": 0.01,
            "profile": {
                "kernels": sum(n for _, n, _ in held),
                "kernel_us": sum(us for *_, us in held),
                "busy_us": sum(us for *_, us in held),
                "by_name": [
                    {"name": name, "per_step": n, "us_per_step": us} for name, n, us in held
                ],
            },
        }
        for (provider, held), speed in zip(kernels.items(), (1000.0, 1100.0, 990.0), strict=True)
    ]
    engine = {"vllm": "0.26.0", "lines": []}
    plugin = engine | {"lines": ["gatefuse: 2 of 2 shared-expert gates fused"]}
    return {
        "kind": "vllm",
        "header": {"device": "a GPU", "torch": "2.11.0", "date": "2026-01-01T00:00:00"},
        "model": "qwen2_moe",
        "layers": 2,
        "engines": {"vllm": engine, "plugin": plugin, "hand-kernel": engine},
        "errors": ["plugin-no-overlap: the process died"],
        "rows": rows,
    }


def write(directory: Path, contents: list[dict[str, Any]]) -> list[str]:
    paths = []
    for content in contents:
        paths.append(directory / f"{content['kind']}.json")
        paths[-1].write_text(json.dumps(content))
    return [str(path) for path in paths]
