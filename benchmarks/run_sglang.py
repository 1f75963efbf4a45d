"""Is the op as fast as the best hand-written kernel known? Both in one run, on one machine.

The baseline is SGLang's fused shared-expert gate, with programmatic dependent launch; it is found
where sglang is installed and loaded by itself, for the rest of sglang is not needed. Both are
called eagerly and replayed through CUDA graphs; inputs and weights are cold. SGLang's kernel adds
into the routed experts' output, the op writes a new tensor.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import zlib
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from filelock import BaseFileLock
from torch import Tensor

from benchmarks.sweep import Row, Run, rotated, sweep
from gatefuse import kernels
from gatefuse.bench.cases import BenchError, Case
from gatefuse.bench.measure import checker
from gatefuse.bench.timing import plan
from gatefuse.bench.workloads import bytes_of, make_set
from gatefuse.environment import version

_USED = SimpleNamespace(
    is_arch_support_pdl=lambda: kernels.supports_pdl(0),
    is_batch_invariant_mode_enabled=lambda: False,
    is_hip=lambda: False,
)
"""All that the source uses of sglang."""
_MODULES = ["sglang", "sglang.kernels.jit.utils", "sglang.srt.batch_invariant_ops"]
_IMPORTED: dict[str, Any] = dict.fromkeys([*_MODULES, "sglang.srt.utils"], _USED)


def load() -> Any:
    """The module of SGLang's kernel. Raises BenchError where there is none."""
    package = importlib.util.find_spec("sglang")  # runs nothing of it
    folders = getattr(package, "submodule_search_locations", None) or ["not-installed"]
    source = Path(next(iter(folders)), "kernels/ops/elementwise/elementwise.py")
    if not source.exists():
        raise BenchError("sglang, whose kernel is the baseline, is not installed")
    spec = importlib.util.spec_from_file_location("gatefuse_bench_sglang", source)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, _IMPORTED):
        spec.loader.exec_module(module)
    return module


def calls_of(workload: str) -> dict[str, Callable[[Any], Tensor]]:
    """The providers: a call each, of a module, its inputs and what SGLang adds into."""
    sglang = load()

    def baseline(one: Any) -> Any:
        module, (x, v, *_), routed = one
        if workload == "mul":
            return sglang.fused_gate_sigmoid_mul(x, module.gate.weight[0], v)
        sglang.fused_gate_sigmoid_mul_add(x, module.gate.weight[0], v, routed)
        return routed

    return {
        "op": lambda one: one[0].op(*one[1])[0],
        "sglang": baseline,
        "roofline": lambda one: one[0].roofline(*one[1])[0],
    }


def make(case: Case, N: int, device: str) -> tuple[Any, tuple[Tensor, ...], Tensor]:
    module, inputs = make_set(case.workload, case.H, N, torch.bfloat16, device)
    return module, inputs, inputs[-1].clone()


def run_case(run: Run, case: Case, lock: BaseFileLock) -> list[Row]:
    torch.manual_seed(zlib.crc32(repr(case).encode()))
    rows = []
    with torch.no_grad():
        calls = calls_of(case.workload)
        for call in calls.values():  # compile, while others measure
            call(make(case, 2, run.device))
        for N in case.rows:
            planned = bytes_of(case.workload, case.H, N, torch.bfloat16)
            number, samples = plan(*planned, 1, run.device)
            with lock:
                sets = [make(case, N, run.device) for _ in range(number)]
                for one in sets:  # a weight is loaded early only after a launch has waited for it
                    calls["op"](one)
                check = checker(*sets[0][:2])
                for provider in ("op", "sglang"):
                    check([calls[provider](sets[0])])
                timings = rotated(calls, sets, samples, run)
                del sets
                torch.cuda.empty_cache()
            for provider, timing in timings.items():
                row = {"workload": case.workload, "H": case.H, "N": N, "provider": provider}
                rows.append(row | {"sglang": version("sglang")} | timing)
    return rows


def run(args: Namespace, run: Run) -> tuple[Path, int]:
    load()
    cases = [Case(workload, H, args.rows) for H in args.widths for workload in ("mul", "add")]
    return sweep("sglang", run, cases, functools.partial(run_case, run))
