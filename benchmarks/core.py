"""Is gatefuse ever slower than Inductor alone? Device time of each chain, arm and size.

    python -m benchmarks.core --out DIR [--chains mul,add,glue] [--widths 2048,4096]
        [--rows 1,2,...] [--modes default,max-autotune,coordinate-descent]
        [--shapes static,dynamic-rows,dynamic] [--time-budget SECONDS] [--shard i/n]

A cell is a chain at one width and number of rows. In a cell every arm is compiled (statically, in
an empty Inductor cache that the cell's arms share, so that equal kernels are tuned once), checked
against float64, captured, and timed interleaved with the others; ``glue`` and ``glue_nogate``
share a cell, so that the gate's cost is a difference within one run. An arm that is wrong is not
timed but recorded with its error. Under ``--shapes dynamic-rows`` the number of rows is symbolic
and under ``dynamic`` the width as well: one compile serves all rows of a width (rows >= 2).

Results are written after each cell to ``DIR/core-<time>-<shard>.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import math
import os
import sys
import time
import types
import zlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch._dynamo.config
import torch._functorch.config
import torch._inductor.config
from torch._inductor.utils import fresh_cache

import gatefuse
from benchmarks import results
from benchmarks.chains import CHAINS, Chain, InputSet, call, make_set
from benchmarks.grid import DRAWS, DTYPE, FAMILIES, MODES, ROWS, SHAPES, WIDTHS
from benchmarks.timing import Plan, Replay, interleaved, plan
from benchmarks.workers import DeviceLock, spread

HINT_ROWS = (
    240  # rows that a dynamic compile sees first; no width, which Dynamo would unite with it
)

INDUCTOR_OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "max-autotune": torch._inductor.list_mode_options("max-autotune-no-cudagraphs"),
    "coordinate-descent": {"coordinate_descent_tuning": True},
}


@dataclass(frozen=True)
class Arm:
    """One way to run a chain: ``name`` as in the results, ``mode`` of Inductor or "-".

    ``draw`` numbers repeated compiles. Inductor's tuning of kernels of a few microseconds is a
    lottery: two compiles of one program differ by 20 % and more, so that a ratio of single draws
    says nothing.
    """

    chain: str
    name: str
    mode: str = "-"
    draw: int = 0

    @property
    def compiled(self) -> bool:
        return self.mode != "-"

    def callable(self, dynamic: bool | None) -> Callable[..., tuple[torch.Tensor, ...]]:
        """``f(module, *inputs)``; compiled at its first call."""
        if self.name == "eager":
            return call
        if self.name in ("op", "limit"):
            return functools.partial(_call_method, self.name)
        options = dict(INDUCTOR_OPTIONS[self.mode])
        if self.name.startswith("gatefuse-"):
            options = gatefuse.options(options, placement=self.name.removeprefix("gatefuse-"))
        function = call
        if self.draw:  # Dynamo would find the code of the first draw
            code = call.__code__.replace(co_name=f"call_{self.draw}")
            function = types.FunctionType(code, call.__globals__)
        return torch.compile(function, fullgraph=True, dynamic=dynamic, options=options)


def _call_method(name: str, module: Chain, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return getattr(module, name)(*inputs)


def arms_of(chain: str, modes: Iterable[str], static: bool) -> list[Arm]:
    """The arms of a chain. Without a gate, gatefuse runs in the default mode only, as a control:
    it must leave the graph alone, and its time against Inductor's shows the noise."""
    arms = [Arm(chain, "eager")]
    if chain in ("mul", "add"):
        arms += [Arm(chain, "limit")] + ([Arm(chain, "op")] if static else [])
    for mode in modes:
        draws = DRAWS if chain == "glue" and mode != "default" else 1
        for draw in range(draws):
            arms.append(Arm(chain, "inductor", mode, draw))
            if chain != "glue_nogate" or mode == "default":
                arms.append(Arm(chain, "gatefuse-auto", mode, draw))
        if chain != "glue_nogate" and mode == "default" and static:
            arms += [Arm(chain, f"gatefuse-{forced}", mode) for forced in ("inline", "kernel")]
    return arms


@dataclass(frozen=True)
class Cell:
    """A unit of work: one family at one width; one number of rows, or several if dynamic."""

    family: str
    shapes: str
    H: int
    rows: tuple[int, ...]
    modes: tuple[str, ...]

    @property
    def static(self) -> bool:
        return self.shapes == "static"

    def arms(self) -> list[Arm]:
        return [a for c in FAMILIES[self.family] for a in arms_of(c, self.modes, self.static)]


def cells_of(
    families: Iterable[str],
    shapes: Iterable[str],
    widths: Iterable[int],
    rows: Iterable[int],
    modes: tuple[str, ...],
) -> list[Cell]:
    """All cells, the most telling first: decode and prefill sizes, then what lies between."""
    telling = (2, 8192, 64, 1024, 1, 32768, 256, 16)
    ordered = sorted(rows, key=lambda n: telling.index(n) if n in telling else len(telling))
    static = [
        Cell(family, "static", H, (N,), modes)
        for N in ordered
        for H in widths
        for family in families
    ]
    several = tuple(sorted(N for N in rows if N >= 2))
    dynamic = [
        Cell(family, shape, H, several, ("default",))
        for shape in SHAPES[1:]
        for H in widths
        for family in families
        if shape in shapes
    ]
    return (static if "static" in shapes else []) + (dynamic if several else [])


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
    running = Running(arm, arm.callable(dynamic))
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
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


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
    device, dtype = setting.device, getattr(torch, setting.dtype)
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
                for module, inputs in rotation[:2]:
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
    with lock:
        timings = interleaved(replays, setting.rounds, device)

    rows = []
    for run in runs:
        row = {
            **result_key(run.arm, cell, N, setting),
            **run.facts,
            "bytes": sets[run.arm.chain][0][0].byte_count(N),
            "sets": plans[run.arm.chain].sets,
        }
        if errors[run.arm] is not None:
            row["error"] = errors[run.arm]
        else:
            timing = asdict(timings[run.arm])
            row["calls_per_graph"] = timing.pop("calls")
            row |= {k: round(v, 4) if k != "repeats" else v for k, v in timing.items()}
        rows.append(row)
    return rows


def release_memory(device: str) -> None:
    """Give unused memory back, for the other processes."""
    if device == "cuda":
        torch.cuda.empty_cache()


def result_key(arm: Arm, cell: Cell, N: int, setting: Setting) -> dict[str, Any]:
    return {
        "chain": arm.chain,
        "arm": arm.name,
        "mode": arm.mode,
        "draw": arm.draw,
        "shapes": cell.shapes,
        "H": cell.H,
        "N": N,
        "dtype": setting.dtype,
    }


@dataclass(frozen=True)
class Setting:
    """What all cells of a run share."""

    device: str
    dtype: str
    rounds: int
    seed: int


def run_cell(setting: Setting, cell: Cell, lock: DeviceLock) -> list[dict[str, Any]]:
    """Compile, check and time a cell; its result rows."""
    torch.manual_seed(setting.seed + zlib.crc32(repr(cell).encode()))
    torch._dynamo.reset()
    # All arms compile the same function, so each is an entry of one cache.
    torch._dynamo.config.recompile_limit = 64
    # Parameters keep their static shape otherwise, and with them the width.
    torch._dynamo.config.force_parameter_static_shapes = cell.shapes != "dynamic"
    torch._dynamo.config.force_nn_module_property_static_shapes = cell.shapes != "dynamic"
    # A graph from the cache comes without the detail of its sites.
    torch._inductor.config.fx_graph_cache = False
    torch._functorch.config.enable_autograd_cache = False

    dtype = getattr(torch, setting.dtype)
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


def parse(arguments: list[str]) -> argparse.Namespace:
    def listed(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
        return lambda text: tuple(kind(part) for part in text.split(","))

    def chosen(allowed: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
        def choose(text: str) -> tuple[str, ...]:
            parts = tuple(text.split(","))
            if unknown := set(parts) - set(allowed):
                raise argparse.ArgumentTypeError(f"{sorted(unknown)} not among {list(allowed)}")
            return parts

        return choose

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.core",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--chains", type=chosen(FAMILIES), default=tuple(FAMILIES))
    parser.add_argument("--shapes", type=chosen(SHAPES), default=("static",))
    parser.add_argument("--widths", type=listed(int), default=WIDTHS)
    parser.add_argument("--rows", type=listed(int), default=ROWS)
    parser.add_argument("--modes", type=chosen(MODES), default=MODES)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default=DTYPE)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="few rounds, two sizes: does it run?")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--time-budget", type=float, default=540, metavar="SECONDS")
    parser.add_argument("--shard", default="0/1", metavar="i/n", help="every n-th cell from i on")
    cores = os.cpu_count() or 1
    parser.add_argument("--processes", type=int, default=max(1, min(12, cores * 3 // 4)))
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Returns 1 if an arm failed, 2 if the time was over before all cells were measured."""
    begin = time.monotonic()
    args = parse(arguments)
    sizes, widths = ((2, 64), args.widths[:1]) if args.quick else (args.rows, args.widths)
    setting = Setting(args.device, args.dtype, 3 if args.quick else 25, args.seed)
    index, count = (int(part) for part in args.shard.split("/"))
    cells = cells_of(args.chains, args.shapes, widths, sizes, args.modes)[index::count]
    path = results.new_path(args.out, f"core-{index}")

    # Many processes compile at once: each does it by itself, and tuning prints no tables.
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    os.environ["TORCHINDUCTOR_AUTOTUNE_NUM_CHOICES_DISPLAYED"] = "0"
    content: dict[str, Any] = {
        "kind": "core",
        "header": results.header(args.device, arguments),
        "rows": [],
        "not_run": [asdict(cell) for cell in cells],
    }
    failed = 0
    work = functools.partial(run_cell, setting)
    deadline = begin + args.time_budget
    for cell, rows, error in spread(work, cells, args.processes, deadline):
        if rows is None:
            print(error, file=sys.stderr, flush=True)
            rows = [
                {**result_key(arm, cell, N, setting), "error": str(error).strip()[-500:]}
                for N in cell.rows
                for arm in cell.arms()
            ]
        content["rows"] += rows
        content["not_run"].remove(asdict(cell))
        results.write(path, content)
        wrong = [row for row in rows if "error" in row]
        failed += len(wrong)
        print(
            f"{time.monotonic() - begin:5.0f} s  {cell.family} {cell.shapes} H={cell.H} "
            f"N={','.join(map(str, cell.rows))}: {len(rows) - len(wrong)} timed, "
            f"{len(wrong)} failed",
            flush=True,
        )
        for row in wrong:
            print(f"        {row['chain']} {row['arm']} {row['mode']}: {row['error']}", flush=True)
    print(f"{path}: {len(content['rows'])} rows, {len(content['not_run'])} cells not run")
    return 1 if failed else 2 if content["not_run"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
