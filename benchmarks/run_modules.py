"""What does gatefuse gain in real layers? Kernels and GPU time of modules of transformers.

The sparse MoE block and one decoder layer with full attention of Qwen3-Next-80B-A3B and
Qwen1.5-MoE-A2.7B (:func:`benchmarks.model_zoo.module`), and a step of training of the layer.

Both providers of a case are compiled several times, for Inductor's own choices turn out differently
from compile to compile. Each compile is compared with eager, profiled (kernels launched per call,
the sum of their durations), and all are timed interleaved through CUDA graphs.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import time
import warnings
import zlib
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from filelock import BaseFileLock
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import gatefuse
from benchmarks import grid, model_zoo
from benchmarks.grid import LAYER_TRAINING, BenchError, ModuleCase
from benchmarks.run_host import timed_pass
from benchmarks.sweep import Row, Run, guard_tuning, sweep
from gatefuse.bench.measure import (
    fusion_facts,
    inductor_options,
    norms,
    peak_bytes,
    reraise_if_broken,
    uncached_compiles,
    with_own_code,
)
from gatefuse.bench.timing import Replay, interleaved

CALLS = 8  # in a sample
PROFILED_CALLS = 4
NO_KERNELS = ("Memcpy", "Memset", "Context Sync")  # what else happens on a GPU

Draw = tuple[str, int]  # a provider and the number of its compile

Call = Callable[..., tuple[Tensor, ...]]


def call_block(module: nn.Module, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor]:
    return (module(hidden),)


def call_layer(module: nn.Module, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    out = module(hidden, position_embeddings=(cos, sin), attention_mask=None)
    return out[:1] if isinstance(out, tuple) else (out,)


def step(call: Call, module: nn.Module, hidden: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """A forward and a backward: the gradients of the hidden states and of all parameters."""
    (out,) = call(module, hidden, *others)
    return torch.autograd.grad(out, (hidden, *module.parameters()), hidden.detach())


def way(case: ModuleCase, compiled: Callable[[Call], Call] = lambda call: call) -> Call:
    """How a case runs its module, and what of it is ``compiled``."""
    call = compiled(call_block if case.part == "block" else call_layer)
    return functools.partial(step, call) if case.part == LAYER_TRAINING else call


def flat(parts: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([part.float().flatten() for part in parts])


def compile_provider(
    provider: str, draw: int, case: ModuleCase, module: nn.Module, inputs: tuple[Tensor, ...]
) -> tuple[Call, tuple[Tensor, ...], Row]:
    """The compiled function, its result, and what is known of the compile."""
    options = inductor_options(provider, case.mode)
    compiled = functools.partial(torch.compile, fullgraph=True, dynamic=False, options=options)
    function = way(case, lambda call: compiled(with_own_code(call, f"{call.__name__}_{draw}")))
    begin = time.perf_counter()
    with gatefuse.record() as report, timed_pass() as spent:
        result = function(module, *inputs)
    facts = {"compile_s": round(time.perf_counter() - begin, 3)}
    facts |= {"pass_ms": round(sum(spent) * 1e3, 3)}
    return function, result, facts | fusion_facts(report, int(provider != "inductor"))


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


def keys(case: ModuleCase) -> list[Row]:
    return [{**asdict(case), "provider": p, "draw": 0} for p in grid.MODULE_PROVIDERS]


def draws(case: ModuleCase, small: bool) -> Iterator[Draw]:
    """What is compiled, in order, each under caches of its own, but for tuned matrix products,
    which take long: the two providers of a draw share them."""
    for draw in range(1 if small else grid.MODULE_DRAWS[case.mode]):
        with fresh_cache():
            for provider in grid.MODULE_PROVIDERS[::-1] if draw % 2 else grid.MODULE_PROVIDERS:
                with fresh_cache() if case.mode == "default" else contextlib.nullcontext():
                    yield provider, draw


def run_case(run: Run, case: ModuleCase, lock: BaseFileLock) -> list[Row]:
    """A result row for each compile, µs per call."""
    guard_tuning(lock)
    torch.manual_seed(zlib.crc32(repr(case).encode()))
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools")
    rows: dict[Draw, Row] = {}
    calls: dict[Draw, Callable[[], tuple[Tensor, ...]]] = {}
    inductor_error = 0.0
    with torch.set_grad_enabled(case.part == LAYER_TRAINING), uncached_compiles():
        module, inputs = model_zoo.module(case.model, case.part, case.tokens, run.device, run.small)
        inputs[0].requires_grad_(case.part == LAYER_TRAINING)
        eager = flat(way(case)(module, *inputs))
        for provider, draw in draws(case, run.small):
            row = rows[provider, draw] = {**asdict(case), "provider": provider, "draw": draw}
            try:
                function, result, facts = compile_provider(provider, draw, case, module, inputs)
                # Both round otherwise than eager does; gatefuse may not be further off.
                error, _ = norms(flat(result) - eager)
                inductor_error = inductor_error or error
                allowed = 2 * inductor_error + torch.finfo(torch.bfloat16).eps * norms(eager)[0]
                if not error <= allowed:
                    raise AssertionError(f"error {error:.3e} > {allowed:.3e}")
                call = functools.partial(function, module, *inputs)
                with lock:
                    profiled(call, run.device)  # the profiler's own start
                    kernels, microseconds = profiled(call, run.device)
                if run.device == "cuda":
                    row["peak_bytes"] = peak_bytes(lambda _, call=call: call())  # type: ignore[misc]
                row |= {**facts, "kernels": kernels, "profiler_us": round(microseconds, 3)}
                calls[provider, draw] = call
            except Exception as error:
                reraise_if_broken(run.device, error)
                row["error"] = f"{error!r}"[:500]
        # What is timed is what was checked; to compile during a capture would break both.
        with lock, torch.compiler.set_stance("fail_on_recompile"):
            replays = {
                draw: Replay(lambda i, call=call: call(), CALLS, run.device, None)  # type: ignore[misc]
                for draw, call in calls.items()
            }
            timings = interleaved(replays, run.rounds, run.device)
    for key, timing in timings.items():
        rows[key] |= timing
    torch.cuda.empty_cache()
    return list(rows.values())


def run(args: Namespace, run: Run) -> tuple[Path, int]:
    if importlib.util.find_spec("transformers") is None:
        raise BenchError("transformers is not installed: pip install 'gatefuse[demo]'")
    rows = args.rows or ((4, 300) if run.small else grid.MODULE_ROWS)
    cases = grid.module_cases(args.models, args.parts, rows, args.modes)
    return sweep("modules", run, cases, functools.partial(run_case, run), keys)
