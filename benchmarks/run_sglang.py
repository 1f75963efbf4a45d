"""Is the op as fast as the best hand-written kernel known? Both in one run, on one machine.

The baseline is SGLang's fused shared-expert gate, with programmatic dependent launch; it is found
where sglang is installed and loaded by itself, for the rest of sglang is not needed. Both are
called eagerly and replayed through CUDA graphs; inputs and weights are cold. SGLang's kernel adds
into the routed experts' output, the op writes a new tensor.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import sys
import types
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from filelock import BaseFileLock
from torch import Tensor, nn

import gatefuse
from benchmarks.sweep import BenchError, Row, Run, rotated, sweep
from gatefuse import kernels
from gatefuse.bench.timing import plan

_SOURCE = "kernels/ops/elementwise/elementwise.py"
_IMPORTED: dict[str, dict[str, Callable[[], bool]]] = {
    "sglang.kernels.jit.utils": {"is_arch_support_pdl": lambda: kernels.supports_pdl(0)},
    "sglang.srt.batch_invariant_ops": {"is_batch_invariant_mode_enabled": lambda: False},
    "sglang.srt.utils": {"is_hip": lambda: False},
}
"""What the source imports from sglang, and all that is used of it."""


@dataclass(frozen=True)
class SGLangCase:
    """A unit of work: one workload at one width, with all providers."""

    workload: str
    H: int
    rows: tuple[int, ...]


def load() -> Any:
    """The module of SGLang's kernel. Raises BenchError where there is none."""
    package = importlib.util.find_spec("sglang")  # runs nothing of it
    folders = package.submodule_search_locations if package is not None else None
    source = Path(next(iter(folders)), _SOURCE) if folders else None
    if source is None or not source.exists():
        raise BenchError("sglang, whose kernel is the baseline, is not installed")
    modules = {}
    for name, attributes in _IMPORTED.items():
        modules[name] = types.ModuleType(name)
        vars(modules[name]).update(attributes)
    spec = importlib.util.spec_from_file_location("gatefuse_bench_sglang", source)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, {"sglang": types.ModuleType("sglang"), **modules}):
        spec.loader.exec_module(module)
    return module


def version() -> str:
    try:
        return importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


Set = tuple[nn.Parameter, Tensor, Tensor, Tensor, Tensor]  # weight, x, v, routed, SGLang's routed


def calls_of(workload: str) -> dict[str, Callable[[Set], Tensor]]:
    """The providers: a call each."""
    sglang = load()

    def op(s: Set) -> Tensor:
        return gatefuse.linear_sigmoid_mul(
            s[1], s[0], s[2], addend=s[3] if workload == "add" else None
        )

    def baseline(s: Set) -> Tensor:
        if workload == "mul":
            result: Tensor = sglang.fused_gate_sigmoid_mul(s[1], s[0][0], s[2])
            return result
        sglang.fused_gate_sigmoid_mul_add(s[1], s[0][0], s[2], s[4])
        return s[4]

    def roofline(s: Set) -> Tensor:
        return torch.add(s[1], s[2]) if workload == "mul" else torch.addcmul(s[3], s[1], s[2])

    return {"op": op, "sglang": baseline, "roofline": roofline}


def run_case(run: Run, case: SGLangCase, lock: BaseFileLock) -> list[Row]:
    """A result row for each provider and number of rows."""
    torch.manual_seed(zlib.crc32(repr(case).encode()))
    with torch.no_grad():
        calls = calls_of(case.workload)
        for call in calls.values():  # compile, while others measure
            call(make_set(case, 2, run.device))
        rows = []
        for N in case.rows:
            rows += measure(case, N, calls, run, lock)
            torch.cuda.empty_cache()
        return rows


def make_set(case: SGLangCase, N: int, device: str) -> Set:
    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    weight = nn.Parameter(make(1, case.H) / case.H**0.5)
    routed = make(N, case.H)
    return weight, make(N, case.H), make(N, case.H), routed, routed.clone()


def measure(
    case: SGLangCase,
    N: int,
    calls: dict[str, Callable[[Set], Tensor]],
    run: Run,
    lock: BaseFileLock,
) -> list[Row]:
    """Check and time all providers at ``N`` rows."""
    device = run.device
    inputs = 2 + (case.workload == "add")
    row_bytes = 2 * N * case.H
    planned = plan(inputs * row_bytes, (inputs + 1) * row_bytes, 1, device)
    with lock:
        sets = [make_set(case, N, device) for _ in range(planned[0])]
        for s in sets:  # a weight is loaded early only after a first launch has waited for it
            calls["op"](s)
        weight, x, v, routed, _ = sets[0]
        reference = torch.sigmoid(x.double() @ weight.double().T) * v.double()
        reference += routed.double() if case.workload == "add" else 0
        for provider in ("op", "sglang"):
            error = (calls[provider](sets[0]).double() - reference).norm() / reference.norm()
            if not error < 4e-3:  # bfloat16 rounds to 2.0e-3 of a value, in the root mean square
                raise AssertionError(f"{provider} is wrong: {case}, N={N}: {error:.2e}")
        timings = rotated(calls, sets, planned[1], run)
    key = {"workload": case.workload, "H": case.H, "N": N}
    return [
        {**key, "provider": provider, "sglang": version(), **timing}
        for provider, timing in timings.items()
    ]


def failed_rows(case: SGLangCase, error: str) -> list[Row]:
    """The rows of a case whose process died."""
    return [{"workload": case.workload, "H": case.H, "N": N, "error": error} for N in case.rows]


def run(widths: Sequence[int], rows: Sequence[int], run: Run) -> tuple[Path, int]:
    """Measure all; see :func:`benchmarks.sweep.sweep`. Raises BenchError without sglang."""
    load()
    cases = [SGLangCase(workload, H, tuple(rows)) for H in widths for workload in ("mul", "add")]
    return sweep("sglang", run, cases, functools.partial(run_case, run), failed_rows)
