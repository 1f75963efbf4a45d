"""Is gatefuse ever slower than Inductor alone? Device time of each workload, provider and size.

Measured as `gatefuse bench` measures, in more modes and sizes. With symbolic sizes one compile
serves all rows of a width.
"""

from __future__ import annotations

import dataclasses
import functools
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import torch._dynamo.config
import torch.nn.functional as F
from filelock import BaseFileLock
from torch import Tensor, nn

from benchmarks.grid import GRIDS, NO_GATE, VARIANTS, Case, Provider, is_hot
from benchmarks.sweep import Row, Run, guard_tuning, sweep
from gatefuse.bench.measure import (
    Running,
    compile_case,
    compile_provider,
    time_providers,
    unique_graphs,
)
from gatefuse.bench.workloads import WORKLOADS, Glue, InputSet, make_set

HINT_ROWS = 240
"""Rows that a dynamic compile sees first; no width, which Dynamo would unite with it."""
SHARED = 512  # inner width of the shared expert, where it is part of the workload


@torch.library.custom_op("gatefuse_bench::opaque", mutates_args=())
def opaque(x: Tensor) -> Tensor:
    """Something that Inductor cannot look into, such as a collective: a copy."""
    return x.clone()


@opaque.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Variant(Glue):
    """The glue with other neighbours of the gate:

    - ``"alone"``: no residual and no next norm; the sum is an output.
    - ``"add-then-reshape"``, ``"reshape-then-add"``: the hidden states are ``[1, N, H]``, the
      experts work on ``[N, H]``, and the routed add is done before or after the way back.
    - ``"matmuls"``: the value is made from x by two matrix products and a SiLU, the shared expert.
    - ``"opaque"``: an opaque call, such as an all-reduce, after the routed add.
    """

    def __init__(self, H: int, variant: str, gated: bool = True) -> None:
        super().__init__(H, gated)
        self.variant = variant
        self.kernels = {"alone": 2, "matmuls": 5, "opaque": 5}.get(variant, 3)
        if variant == "alone":
            del self.norm_out
        if variant == "matmuls":
            self.inputs = 2
            self.up = nn.Linear(H, SHARED, bias=False)
            self.down = nn.Linear(SHARED, H, bias=False)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        res, routed = inputs[:2]
        reshaped = self.variant in ("add-then-reshape", "reshape-then-add")
        if reshaped:
            res = res.unsqueeze(0)
        hidden = self.norm_in(res)
        x = hidden.view(-1, hidden.shape[-1]) if reshaped else hidden
        logits = self.router(x)
        v = self.down(F.silu(self.up(x))) if self.variant == "matmuls" else inputs[2]
        if self.gated:
            v = F.sigmoid(self.gate(x)) * v
        if self.variant == "reshape-then-add":
            out = routed.view(hidden.shape) + v.view(hidden.shape)
        else:
            out = routed + v
        if self.variant == "add-then-reshape":
            out = out.view(hidden.shape)
        if self.variant == "opaque":
            out = opaque(out)
        if self.variant == "alone":
            return logits, out
        res = res + out
        return logits, res, self.norm_out(res)


for _name in VARIANTS:
    _make = functools.partial(Variant, variant=_name.removeprefix("glue-"))
    WORKLOADS |= {_name: _make, _name + NO_GATE: functools.partial(_make, gated=False)}


def compile_dynamic(case: Case, provider: Provider, hint: InputSet) -> Running:
    """Compile for symbolic rows; if the width is symbolic, the code must serve another one."""
    _, inputs = hint
    wide = case.shapes == "dynamic"
    if provider.compiled and not wide:
        for tensor in inputs:
            torch._dynamo.mark_dynamic(tensor, 0)
    running = compile_provider(provider, hint, dynamic=True if wide else None)
    if provider.compiled and wide and running.error is None:
        graphs, dtype = unique_graphs(), inputs[0].dtype
        other = make_set(provider.workload, case.H // 2, HINT_ROWS, dtype, case.device)
        running.function(other[0], *other[1])
        if unique_graphs() != graphs:
            running.error = "compile: the width is not symbolic"
    return running


def run_case(rounds: int, case: Case, lock: BaseFileLock) -> list[Row]:
    """Compile, check and time a case; its result rows: µs per call of each provider."""
    guard_tuning(lock)
    static = case.shapes == "static"
    # Parameters keep their static shape otherwise, and with them the width.
    fixed = case.shapes != "dynamic"
    torch._dynamo.config.force_parameter_static_shapes = fixed
    torch._dynamo.config.force_nn_module_property_static_shapes = fixed
    one = compile_provider if static else functools.partial(compile_dynamic, case)
    rows: list[Row] = []
    with torch.no_grad():
        runs = compile_case(case, case.rows[0] if static else HINT_ROWS, one)
        for N in case.rows:
            cold = time_providers(runs, N, case, rounds, lock)
            if is_hot(case):
                for row, hot in zip(cold, time_providers(runs, N, case, rounds, lock, hot=True)):
                    times = {f"hot_{name}": hot[name] for name in hot if name.endswith("_us")}
                    row |= times or {"error": hot["error"]}
            rows += cold
    return rows


def keys(case: Case) -> list[Row]:
    return [case.columns(provider, N) for N in case.rows for provider in case.providers()]


def run(args: Namespace, run: Run) -> tuple[Path, int]:
    given = {n: getattr(args, n) for n in ("workloads", "widths", "rows", "modes", "dtypes")}
    changes: dict[str, Any] = {"widths": (128,), "rows": (2, 64)} if run.small else {}
    changes |= {name: value for name, value in given.items() if value is not None}
    names = args.grid or (("main",) if run.device == "cuda" else ("cpu",))
    grids = [dataclasses.replace(GRIDS[n], device=run.device, **changes) for n in names]
    cases = [case for one in grids for case in one.cases()]
    kind = "cpu" if run.device == "cpu" else "workloads"
    return sweep(kind, run, cases, functools.partial(run_case, run.rounds), keys)
