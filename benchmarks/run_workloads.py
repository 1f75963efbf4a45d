"""Is gatefuse ever slower than Inductor alone? Device time of each chain, arm and size.

In a cell (:class:`benchmarks.grid.Cell`) every arm is compiled, in an empty Inductor cache that
the cell's arms share, so that equal kernels are tuned once; checked against float64; captured; and
timed interleaved with the others. A chain of the glue shares its cell with the same chain without
the gate, so that the gate's cost is a difference within one run. An arm that is wrong is not timed
but recorded with its error. With symbolic sizes one compile serves all rows of a width.

Inputs are colder than the cache of the device. The gate alone is also timed hot, on one input set
that every call uses again; hot and cold are equal where that set is larger than the cache.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import time
import types
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch._dynamo.config
import torch._functorch.config
import torch._inductor.config
from torch._inductor.utils import fresh_cache

import gatefuse
from benchmarks.grid import FAMILIES, Arm, Cell
from benchmarks.sweep import Setting, sweep
from benchmarks.workers import DeviceLock
from gatefuse.bench.timing import Plan, Replay, Timing, interleaved, plan
from gatefuse.bench.workloads import CHAINS, Chain, InputSet, call, make_set

HINT_ROWS = 240
"""Rows that a dynamic compile sees first; no width, which Dynamo would unite with it."""

INDUCTOR_OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "max-autotune": torch._inductor.list_mode_options("max-autotune-no-cudagraphs"),
    "coordinate-descent": {"coordinate_descent_tuning": True},
}

Function = Callable[..., tuple[torch.Tensor, ...]]


def function_of(arm: Arm, dynamic: bool | None) -> Function:
    """``f(module, *inputs)``, the arm's way to run it; compiled at its first call."""
    if arm.name == "eager":
        return call
    if arm.name in ("op", "limit"):
        return functools.partial(_call_method, arm.name)
    options = inductor_options(arm.name, arm.mode)
    function = with_own_code(call, f"call_{arm.draw}")
    return torch.compile(function, fullgraph=True, dynamic=dynamic, options=options)


def with_own_code(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A copy of a function without closure or defaults, for one compile.

    Dynamo keeps compiles by code object: it would compare the options of each compile with those of
    a call, which takes microseconds, and take two compiles with the same options for one.
    """
    return types.FunctionType(function.__code__.replace(co_name=name), function.__globals__)


def inductor_options(name: str, mode: str) -> dict[str, Any]:
    """Options of the arm ``"inductor"`` or ``"gatefuse-<placement>"`` in a mode of the results."""
    options = dict(INDUCTOR_OPTIONS[mode])
    if name.startswith("gatefuse-"):
        options = gatefuse.options(options, placement=name.removeprefix("gatefuse-"))
    return options


def _call_method(name: str, module: Chain, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    result: tuple[torch.Tensor, ...] = getattr(module, name)(*inputs)
    return result


@dataclass
class Running:
    """An arm after its compile: how to call it, and what becomes of its result row."""

    arm: Arm
    function: Callable[..., tuple[torch.Tensor, ...]]
    facts: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


def reraise_if_broken(device: str, error: Exception) -> None:
    """Raise ``error`` if it left the device unusable for this process."""
    if device == "cuda":
        try:
            torch.ones(1, device=device).sum().item()
        except RuntimeError:
            raise error from None


def compile_arm(arm: Arm, shapes: str, hint: InputSet, other_width: InputSet) -> Running:
    """Compile ``arm`` on the input set ``hint``; if the width is symbolic, the same code must serve
    ``other_width``."""
    dynamic = {"static": False, "dynamic-rows": None, "dynamic": True}[shapes]
    running = Running(arm, function_of(arm, dynamic))
    module, inputs = hint
    expected = tuple(y.shape for y in call(module, *inputs))
    try:
        if arm.compiled and shapes == "dynamic-rows":
            for tensor in inputs:
                torch._dynamo.mark_dynamic(tensor, 0)
        graphs = unique_graphs()
        begin = time.perf_counter()
        with gatefuse.record() as report:
            outputs = running.function(module, *inputs)
        if arm.compiled:
            sites = [site for graph in report.graphs for site in graph.sites]
            running.facts = {
                "compile_s": round(time.perf_counter() - begin, 3),
                "fused": report.fused,
                "placement": sorted({str(site.placement) for site in sites}),
            }
            if unique_graphs() != graphs + 1:
                raise RuntimeError(f"{unique_graphs() - graphs} graphs were compiled, not 1")
            if shapes == "dynamic":
                running.function(other_width[0], *other_width[1])
                if unique_graphs() != graphs + 1:
                    raise RuntimeError("the width is not symbolic")
        if arm.name != "limit" and tuple(y.shape for y in outputs) != expected:
            raise RuntimeError(f"shapes {[tuple(y.shape) for y in outputs]}, not {expected}")
    except Exception as error:
        reraise_if_broken(inputs[0].device.type, error)
        running.error = f"compile: {error!r}"[:500]
    return running


def unique_graphs() -> int:
    """Graphs that Dynamo has compiled in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@dataclass(frozen=True)
class Reference:
    """Outputs in float64 and eager's own error, per output: root mean square and worst element."""

    outputs: tuple[torch.Tensor, ...]
    eager: tuple[tuple[float, float], ...]

    @classmethod
    def of(cls, module: Chain, inputs: tuple[torch.Tensor, ...]) -> Reference:
        exact = copy.deepcopy(module).double()(*(x.double() for x in inputs))
        eager = zip(module(*inputs), exact, strict=True)
        return cls(exact, tuple(_distance(y, ref) for y, ref in eager))

    def check(self, outputs: tuple[torch.Tensor, ...]) -> None:
        """Raise unless ``|y - ref| <= 2 * |eager - ref| + eps`` holds for every output, in the root
        mean square (eps: float32's, of the reference) and in the worst element (eps: one unit in
        the last place of the largest). NaN never passes."""
        for i, (y, ref) in enumerate(zip(outputs, self.outputs, strict=True)):
            eps = (torch.finfo(torch.float32).eps, torch.finfo(y.dtype).eps)
            scale = (float(ref.square().mean().sqrt()), float(ref.abs().max()))
            for k, what in enumerate(("rms", "worst")):
                error, allowed = _distance(y, ref)[k], 2 * self.eager[i][k] + eps[k] * scale[k]
                if not error <= allowed:
                    raise AssertionError(f"output {i}: {what} error {error:.3e} > {allowed:.3e}")


def _distance(y: torch.Tensor, ref: torch.Tensor) -> tuple[float, float]:
    difference = y.double() - ref
    return float(difference.square().mean().sqrt()), float(difference.abs().max())


def poison_allocator(like: tuple[torch.Tensor, ...]) -> None:
    """Fill free blocks of the sizes of ``like`` with NaN, so that what a call leaves unwritten in
    an output it allocates is found. (A graph's outputs are poisoned in place instead.)"""
    blocks = [torch.full_like(y, math.nan) for y in like for _ in range(4)]
    del blocks


def measure(
    runs: list[Running], N: int, cell: Cell, setting: Setting, lock: DeviceLock
) -> list[dict[str, Any]]:
    """Check, capture and time all arms at ``N`` rows; one result row per arm."""
    device, dtype = setting.device, getattr(torch, cell.dtype)
    chains = FAMILIES[cell.family]
    plans: dict[str, Plan] = {}
    for chain in chains:
        shape = CHAINS[chain](cell.H).to(dtype)
        plans[chain] = plan(shape.input_bytes(N), shape.byte_count(N), shape.kernels, device)
    with lock:
        sets = {
            c: [make_set(c, cell.H, N, dtype, device) for _ in range(plans[c].sets)] for c in chains
        }
        # The last set of a rotation is the one that a replay leaves its outputs of.
        references = {c: Reference.of(*sets[c][-1]) for c in chains}
        release_memory(device)
    pool = torch.cuda.graph_pool_handle() if device == "cuda" else None
    replays: dict[Arm, Replay] = {}
    errors = {run.arm: run.error for run in runs}
    for run in runs:
        arm, rotation = run.arm, sets[run.arm.chain]
        if run.error is not None:
            continue
        graphs = unique_graphs()
        try:
            with lock:
                module, inputs = rotation[-1]
                poison_allocator(call(module, *inputs))
                outputs = run.function(module, *inputs)
                if arm.name != "limit":
                    references[arm.chain].check(outputs)
                # The op loads a weight early only after a first launch has waited for it.
                for module, inputs in rotation if arm.name == "op" else rotation[:2]:
                    run.function(module, *inputs)

            def call_set(i: int, run: Running = run, rotation: list = rotation) -> Any:
                module, inputs = rotation[i % len(rotation)]
                return run.function(module, *inputs)

            replay = Replay(call_set, plans[arm.chain].calls, device, pool)
            with lock:
                for y in replay.outputs:
                    y.fill_(math.nan)
                replay.run()
                if arm.name != "limit":
                    references[arm.chain].check(replay.outputs)
            if unique_graphs() != graphs:
                raise RuntimeError("recompiled for another input set")
            replays[arm] = replay
        except Exception as error:
            reraise_if_broken(device, error)
            errors[arm] = f"{error!r}"[:500]
    del references
    hot: dict[Arm, Replay] = {}
    if cell.hot:
        for arm, replay in replays.items():

            def call_same(i: int, call_set: Function = replay.call) -> tuple[torch.Tensor, ...]:
                return call_set(0)

            hot[arm] = Replay(call_same, replay.calls, device, pool)
    with lock:
        timings = interleaved(replays, setting.rounds, device)
        hot_timings = interleaved(hot, setting.rounds, device)

    rows = []
    for run in runs:
        row: dict[str, Any] = {
            **result_key(run.arm, cell, N),
            **run.facts,
            "bytes": sets[run.arm.chain][0][0].byte_count(N),
            "sets": plans[run.arm.chain].sets,
        }
        if errors[run.arm] is not None:
            row["error"] = errors[run.arm]
        else:
            row |= columns(timings[run.arm])
            if run.arm in hot_timings:
                row |= {f"hot_{k}": v for k, v in columns(hot_timings[run.arm]).items()}
        rows.append(row)
    return rows


def columns(timing: Timing) -> dict[str, Any]:
    """A timing as columns of a result row: nanoseconds are the last digits."""
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(timing).items()}


def release_memory(device: str) -> None:
    """Give unused memory back, for the other processes."""
    if device == "cuda":
        torch.cuda.empty_cache()


def result_key(arm: Arm, cell: Cell, N: int) -> dict[str, Any]:
    """The columns that tell what a row is of."""
    return {
        "chain": arm.chain,
        "arm": arm.name,
        "mode": arm.mode,
        "draw": arm.draw,
        "shapes": cell.shapes,
        "H": cell.H,
        "N": N,
        "dtype": cell.dtype,
    }


def failed_rows(cell: Cell, error: str) -> list[dict[str, Any]]:
    """The rows of a cell whose process died."""
    return [{**result_key(arm, cell, N), "error": error} for N in cell.rows for arm in cell.arms()]


def run_cell(setting: Setting, cell: Cell, lock: DeviceLock) -> list[dict[str, Any]]:
    """Compile, check and time a cell; its result rows: µs per call of each arm."""
    torch.manual_seed(setting.seed + zlib.crc32(repr(cell).encode()))
    torch._dynamo.reset()
    # Parameters keep their static shape otherwise, and with them the width.
    torch._dynamo.config.force_parameter_static_shapes = cell.shapes != "dynamic"
    torch._dynamo.config.force_nn_module_property_static_shapes = cell.shapes != "dynamic"
    # A graph from the cache comes without the detail of its sites.
    torch._inductor.config.fx_graph_cache = False
    torch._functorch.config.enable_autograd_cache = False

    dtype = getattr(torch, cell.dtype)
    with torch.no_grad(), fresh_cache():
        hint_rows = cell.rows[0] if cell.static else HINT_ROWS
        hints, others = (
            {c: make_set(c, H, hint_rows, dtype, setting.device) for c in FAMILIES[cell.family]}
            for H in (cell.H, cell.H // 2)
        )
        runs = []
        for arm in cell.arms():
            with fresh_cache() if arm.draw else contextlib.nullcontext():
                runs.append(compile_arm(arm, cell.shapes, hints[arm.chain], others[arm.chain]))
        rows = [row for N in cell.rows for row in measure(runs, N, cell, setting, lock)]
    release_memory(setting.device)
    return rows


def run(
    cells: Sequence[Cell],
    setting: Setting,
    out: Path,
    processes: int,
    time_budget: float,
) -> tuple[Path, int]:
    """Measure ``cells``; see :func:`benchmarks.sweep.sweep`."""
    kind = "cpu" if setting.device == "cpu" else "core"
    work = functools.partial(run_cell, setting)
    return sweep(kind, setting.device, cells, work, failed_rows, out, processes, time_budget)
