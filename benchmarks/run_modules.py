"""What does gatefuse gain in real layers? Kernels and GPU time of modules of transformers.

The sparse MoE block and one decoder layer with full attention of Qwen3-Next-80B-A3B and
Qwen1.5-MoE-A2.7B, at their real widths, in bfloat16, with hardly more experts than a token is
routed to. Up to 256 tokens are a batch of single tokens (decode), more are one sequence (prefill).

Both arms of a cell are compiled several times, for Inductor's own choices turn out differently from
compile to compile. Each compile is compared with eager, profiled (kernels launched per call, the
sum of their durations), and all are timed interleaved through CUDA graphs; where a module cannot be
captured, its time is the profiler's sum, and ``timed_by`` says so.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch._dynamo.config
import torch._functorch.config
import torch._inductor.config
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import gatefuse
from benchmarks import grid
from benchmarks.grid import BlockCell
from benchmarks.run_host import timed_pass
from benchmarks.run_workloads import (
    columns,
    inductor_options,
    release_memory,
    reraise_if_broken,
    with_own_code,
)
from benchmarks.store import BenchError, Row
from benchmarks.sweep import Setting, sweep
from benchmarks.workers import DeviceLock
from gatefuse.bench.timing import Replay, Timing, interleaved

ARMS = ("inductor", "gatefuse-auto")
CLASSES = {"qwen3_next": "Qwen3Next", "qwen2_moe": "Qwen2Moe"}
FULL_ATTENTION_LAYER = 3  # of Qwen3-Next, whose other layers are gated delta nets
DECODE_TOKENS = 256
CALLS = 8  # in a sample
PROFILED_CALLS = 4
NO_KERNELS = ("Memcpy", "Memset", "Context Sync")  # what else happens on a GPU

SMALL = {
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
"""Sizes for a try without a GPU."""

Draw = tuple[str, int]
"""An arm and the number of its compile."""

Call = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


def config_of(model: str, small: bool) -> Any:
    """The model's own sizes, which are the defaults of the configurations, with few experts: as
    many as a token is routed to, and up to a multiple of eight, for other widths of the router's
    product Inductor pads, or does not, as a measurement of its own turns out."""
    transformers: Any = importlib.import_module("transformers")
    config = getattr(transformers, f"{CLASSES[model]}Config")(**(SMALL if small else {}))
    config.num_experts = -(-config.num_experts_per_tok // 8) * 8
    config._experts_implementation = "grouped_mm"  # the others break the graph or copy weights
    config._attn_implementation = "sdpa"
    return config


def make_module(cell: BlockCell, setting: Setting) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The module with random weights, and its inputs: hidden states, and the rotary embedding's
    cosine and sine."""
    config = config_of(cell.model, setting.small)
    path = f"transformers.models.{cell.model}.modeling_{cell.model}"
    classes: Any = importlib.import_module(path)
    prefix = CLASSES[cell.model]
    batched = cell.tokens <= DECODE_TOKENS
    shape = (cell.tokens, 1) if batched else (1, cell.tokens)
    with torch.device(setting.device):
        if cell.part == "block":
            module = getattr(classes, f"{prefix}SparseMoeBlock")(config)
        else:
            module = getattr(classes, f"{prefix}DecoderLayer")(config, FULL_ATTENTION_LAYER)
        for parameter in module.parameters():
            if parameter.dim() == 1:
                nn.init.uniform_(parameter, 0.5, 1.5)
            else:
                nn.init.normal_(parameter, std=0.02)
        hidden = torch.randn(*shape, config.hidden_size, dtype=torch.bfloat16)
        positions = torch.arange(shape[1]).expand(shape)
        rotary = getattr(classes, f"{prefix}RotaryEmbedding")(config)
        cos, sin = rotary(hidden, positions)
    return module.to(torch.bfloat16).eval(), (hidden, cos, sin)


def call_block(module: nn.Module, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out: Tensor = module(hidden)
    return out


def call_layer(module: nn.Module, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out = module(hidden, position_embeddings=(cos, sin), attention_mask=None)
    tensor: Tensor = out[0] if isinstance(out, tuple) else out
    return tensor


CALL: dict[str, Call] = {"block": call_block, "layer": call_layer}


def compile_arm(
    arm: str, draw: int, cell: BlockCell, module: nn.Module, inputs: tuple[Tensor, ...]
) -> tuple[Call, Tensor, Row]:
    """The compiled function, its result, and what is known of the compile."""
    options = inductor_options(arm, cell.mode)
    function = torch.compile(
        with_own_code(CALL[cell.part], f"call_{cell.part}_{draw}"),
        fullgraph=True,
        dynamic=False,
        options=options,
    )
    begin = time.perf_counter()
    with gatefuse.record() as report, timed_pass() as spent:
        result = function(module, *inputs)
    sites = [site for graph in report.graphs for site in graph.sites]
    if report.fused != (1 if arm.startswith("gatefuse-") else 0):
        raise RuntimeError(f"{report.fused} gates were fused\n{report}")
    facts = {
        "compile_s": round(time.perf_counter() - begin, 3),
        "pass_ms": round(sum(spent) * 1e3, 3),
        "fused": report.fused,
        "placement": sorted({str(site.placement) for site in sites}),
    }
    return function, result, facts


def profiled(call: Callable[[], Any], device: str) -> tuple[int, float]:
    """Kernels per call and the sum of their durations in µs (on the CPU: operators)."""
    on_gpu = device == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as found:
        for _ in range(PROFILED_CALLS):
            call()
        if on_gpu:
            torch.cuda.synchronize()
    events = [
        event
        for event in found.events() or []
        if event.device_type == (DeviceType.CUDA if on_gpu else DeviceType.CPU)
        and not getattr(event, "is_user_annotation", False)
        and not event.name.startswith(NO_KERNELS)
    ]
    microseconds = sum(float(event.time_range.elapsed_us()) for event in events)
    return round(len(events) / PROFILED_CALLS), microseconds / PROFILED_CALLS


def time_calls(
    calls: dict[Draw, Callable[[], Tensor]], device: str, rounds: int
) -> tuple[dict[Draw, Timing], Row]:
    """Device time of each call, and how it was measured: ``timed_by`` is ``"graph"``, or
    ``"profiler"`` if one of them cannot be captured in a CUDA graph, with the reason in
    ``not_captured`` (on the CPU ``"graph"`` is a loop)."""
    try:
        replays = {
            arm: Replay(lambda i, call=call: (call(),), CALLS, device, None)  # type: ignore[misc]
            for arm, call in calls.items()
        }
    except RuntimeError as error:
        reraise_if_broken(device, error)
        if device == "cuda":  # the failed capture leaves the generator in the middle of it
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
            generator.graphsafe_set_state(generator.clone_state())
        samples: dict[Draw, list[float]] = {arm: [] for arm in calls}
        for _ in range(rounds):
            for arm, call in calls.items():
                samples[arm].append(profiled(call, device)[1])
        timings = {arm: Timing.of(samples[arm], PROFILED_CALLS) for arm in calls}
        return timings, {"timed_by": "profiler", "not_captured": f"{error!r}"[:500]}
    return interleaved(replays, rounds, device), {"timed_by": "graph"}


def rms(t: Tensor) -> float:
    return float(t.float().square().mean().sqrt())


def key_columns(cell: BlockCell, arm: str, draw: int = 0) -> Row:
    """The columns that tell what a row is of."""
    return {
        "model": cell.model,
        "part": cell.part,
        "tokens": cell.tokens,
        "arm": arm,
        "mode": cell.mode,
        "draw": draw,
    }


def failed_rows(cell: BlockCell, error: str) -> list[Row]:
    """The rows of a cell whose process died."""
    return [{**key_columns(cell, arm), "error": error} for arm in ARMS]


def draws(cell: BlockCell, setting: Setting) -> Iterator[Draw]:
    """What is compiled, in order, each under caches of its own, but for tuned matrix products,
    which take long: the two arms of a draw share them."""
    for draw in range(1 if setting.small else grid.BLOCK_DRAWS[cell.mode]):
        with fresh_cache():
            for arm in ARMS[::-1] if draw % 2 else ARMS:
                with fresh_cache() if cell.mode == "default" else contextlib.nullcontext():
                    yield arm, draw


def run_cell(setting: Setting, cell: BlockCell, lock: DeviceLock) -> list[Row]:
    """Compile, check, profile and time both arms; a result row for each compile, µs per call."""
    torch.manual_seed(setting.seed + zlib.crc32(repr(cell).encode()))
    torch._dynamo.reset()
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools")
    # A graph from the cache comes without the detail of its sites.
    torch._inductor.config.fx_graph_cache = False
    torch._functorch.config.enable_autograd_cache = False
    device = setting.device
    rows: dict[Draw, Row] = {}
    calls: dict[Draw, Callable[[], Tensor]] = {}
    inductor_error = 0.0
    with torch.no_grad():
        module, inputs = make_module(cell, setting)
        eager = CALL[cell.part](module, *inputs).float()
        for arm, draw in draws(cell, setting):
            row = rows[arm, draw] = key_columns(cell, arm, draw)
            try:
                function, result, facts = compile_arm(arm, draw, cell, module, inputs)
                # Both round otherwise than eager does; gatefuse may not be further off.
                error = rms(result.float() - eager)
                inductor_error = inductor_error or error
                allowed = 2 * inductor_error + torch.finfo(torch.bfloat16).eps * rms(eager)
                if not error <= allowed:
                    raise AssertionError(f"error {error:.3e} > {allowed:.3e}")
                call = functools.partial(function, module, *inputs)
                with lock:
                    profiled(call, device)  # the profiler's own start
                    kernels, microseconds = profiled(call, device)
                row |= {**facts, "kernels": kernels, "profiler_us": round(microseconds, 3)}
                calls[arm, draw] = call
            except Exception as error:
                reraise_if_broken(device, error)
                row["error"] = f"{error!r}"[:500]
        # What is timed is what was checked; to compile during a capture would break both.
        with lock, torch.compiler.set_stance("fail_on_recompile"):
            timings, how = time_calls(calls, device, setting.rounds)
    for key, timing in timings.items():
        rows[key] |= {**how, **columns(timing)}
    release_memory(device)
    return list(rows.values())


def run(
    cells: Sequence[BlockCell],
    setting: Setting,
    out: Path,
    processes: int,
    time_budget: float,
) -> tuple[Path, int]:
    """Measure ``cells``; see :func:`benchmarks.sweep.sweep`. Raises BenchError without
    transformers."""
    if importlib.util.find_spec("transformers") is None:
        raise BenchError("transformers is not installed: pip install 'gatefuse[demo]'")
    work = functools.partial(run_cell, setting)
    return sweep("blocks", setting.device, cells, work, failed_rows, out, processes, time_budget)
