"""Measures a case: each provider is compiled, checked against float64, captured, and timed beside
the others. One that is wrong, or claims a fusion and fused no gate, is not timed: its error is
recorded."""

from __future__ import annotations

import contextlib
import copy
import math
import time
import types
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._dynamo.config
import torch._functorch.config
import torch._inductor.config
from torch import Tensor
from torch._inductor.utils import fresh_cache

import gatefuse
from gatefuse.bench.cases import TRAINING, Case, Provider
from gatefuse.bench.timing import Replay, interleaved, plan
from gatefuse.bench.workloads import WORKLOADS, InputSet, bytes_of, call, make_set

INDUCTOR_OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "max-autotune": torch._inductor.list_mode_options("max-autotune-no-cudagraphs"),
    "coordinate-descent": {"coordinate_descent_tuning": True},
}

Row = dict[str, Any]
Function = Callable[..., tuple[Tensor, ...]]


def function_of(provider: Provider, dynamic: bool | None = False) -> Function:
    """``f(module, *inputs)``, the provider's way to run it; compiled at its first call."""
    if provider.name == "eager":
        return call
    if not provider.compiled:
        return lambda module, *inputs: getattr(module, provider.name)(*inputs)
    function = with_own_code(call, f"call_{provider.draw}")
    options = inductor_options(provider.name, provider.mode)
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, options=options)
    if provider.workload.endswith(TRAINING):
        return lambda module, *inputs: module.step(compiled, *inputs)
    return compiled


def with_own_code(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A copy of a function without closure or defaults, for one compile. Dynamo keeps compiles by
    code object: it would compare their options at each call and take equal ones for the same."""
    return types.FunctionType(function.__code__.replace(co_name=name), function.__globals__)


def inductor_options(name: str, mode: str) -> dict[str, Any]:
    """Options of ``"inductor"`` or ``"gatefuse-<placement>"`` in a mode of the results."""
    options = dict(INDUCTOR_OPTIONS[mode])
    if name.startswith("gatefuse-"):
        options = gatefuse.options(options, placement=name.removeprefix("gatefuse-"))
    return options


def fusion_facts(report: gatefuse.Report, gates: int) -> Row:
    """What a compile fused, as columns. Raises RuntimeError unless it fused ``gates``. A gate that
    the cost model declined is measured as a user gets it, unfused, with the reason."""
    left = [r.reason for r in report.rejections if r.reason.endswith("forced placement fuses it")]
    if report.fused + len(left) != gates:
        raise RuntimeError(f"{report.fused} gates were fused, not {gates}\n{report}")
    placements = sorted({str(site.placement) for site in report.sites})
    facts = {"fused": report.fused, "placement": placements}
    return facts | ({"left_alone": left[0]} if left else {})


@dataclass
class Running:
    """A provider after its compile: how to call it, and what becomes of its result row."""

    provider: Provider
    function: Function
    facts: Row = field(default_factory=dict)
    error: str | None = None


def reraise_if_broken(device: str, error: Exception) -> None:
    """Raise ``error`` if it left the device unusable for this process."""
    if device == "cuda":
        try:
            torch.ones(1, device=device).sum().item()
        except RuntimeError:
            raise error from None


@contextlib.contextmanager
def uncached_compiles() -> Iterator[None]:
    """Compile anew inside: a graph from a cache would come without the detail of its sites.
    Kernels that were built before are reused."""
    torch.compiler.reset()
    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield


def unique_graphs() -> int:
    """Graphs that Dynamo has compiled in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def compile_provider(provider: Provider, hint: InputSet, dynamic: bool | None = False) -> Running:
    """Compile on the input set ``hint``; what goes wrong is the result's ``error``."""
    running = Running(provider, function_of(provider, dynamic))
    module, inputs = hint
    try:
        expected = [y.shape for y in call(module, *inputs)]
        graphs, begin = unique_graphs(), time.perf_counter()
        with gatefuse.record() as report:
            outputs = running.function(module, *inputs)
        if provider.compiled:
            running.facts["compile_s"] = round(time.perf_counter() - begin, 3)
            running.facts |= fusion_facts(report, provider.gates)
            if unique_graphs() != graphs + 1:
                raise RuntimeError(f"{unique_graphs() - graphs} graphs were compiled, not 1")
        if provider.name != "roofline" and [y.shape for y in outputs] != expected:
            raise RuntimeError(f"shapes {[y.shape for y in outputs]}, not {expected}")
    except Exception as error:
        reraise_if_broken(inputs[0].device.type, error)
        running.error = f"compile: {error!r}"[:500]
    return running


def checker(module: Any, inputs: tuple[Tensor, ...]) -> Callable[[Sequence[Tensor]], None]:
    """A check of outputs against float64: it raises AssertionError unless ``|y - ref| <=
    2 * |eager - ref| + eps`` holds for every output, in the root mean square (eps: float32's, of
    the reference) and in the worst element (eps: one unit in the last place of the largest). NaN
    never passes."""
    exact = copy.deepcopy(module).double()(*(x.double() for x in inputs))
    eager = [norms(y.double() - ref) for y, ref in zip(module(*inputs), exact, strict=True)]

    def check(outputs: Sequence[Tensor]) -> None:
        for i, (y, ref) in enumerate(zip(outputs, exact, strict=True)):
            eps = (torch.finfo(torch.float32).eps, torch.finfo(y.dtype).eps)
            errors = zip(("rms", "worst"), norms(y.double() - ref), eager[i], eps, norms(ref))
            for what, error, by_eager, unit, scale in errors:
                if not error <= (allowed := 2 * by_eager + unit * scale):
                    raise AssertionError(f"output {i}: {what} error {error:.3e} > {allowed:.3e}")

    return check


def norms(t: Tensor) -> tuple[float, float]:
    """Root mean square and largest magnitude."""
    return float(t.square().mean().sqrt()), float(t.abs().max())


def peak_bytes(call_set: Callable[[int], Any]) -> int:
    """Most bytes of the device that a call has allocated at a time, its outputs included."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call_set(-1)
    return torch.cuda.max_memory_allocated() - before


def time_providers(
    runs: list[Running],
    N: int,
    case: Case,
    rounds: int,
    alone: AbstractContextManager[Any] | None = None,
    hot: bool = False,
) -> list[Row]:
    """Check, capture and time all providers at ``N`` rows; one result row each, µs per call.

    alone: held while the device must be left to this process. hot: every call uses the same inputs.
    """
    alone = contextlib.nullcontext() if alone is None else alone
    device, dtype = case.device, getattr(torch, case.dtype)
    moved = {w: bytes_of(w, case.H, N, dtype) for w in case.workloads}
    plans = {w: plan(*moved[w], WORKLOADS[w](case.H).kernels, device) for w in case.workloads}
    with alone:
        sets = {
            w: [make_set(w, case.H, N, dtype, device) for _ in range(1 if hot else plans[w][0])]
            for w in case.workloads
        }
        # The last set of a rotation is the one that a replay leaves its outputs of.
        checks = {w: checker(*sets[w][-1]) for w in case.workloads}
        torch.cuda.empty_cache()
    pool = torch.cuda.graph_pool_handle() if device == "cuda" else None
    replays: dict[Provider, Replay] = {}
    errors = {run.provider: run.error for run in runs if run.error is not None}
    for run in runs:
        provider, rotation = run.provider, sets[run.provider.workload]
        if provider in errors:
            continue

        def call_set(i: int, run: Running = run, rotation: list[InputSet] = rotation) -> Any:
            module, inputs = rotation[i % len(rotation)]
            return run.function(module, *inputs)

        check = checks[provider.workload] if provider.name != "roofline" else lambda outputs: None
        graphs = unique_graphs()
        try:
            with alone:
                # What a call leaves unwritten in the outputs that it allocates is then NaN.
                first = call_set(-1)
                poison = [torch.full_like(y, math.nan) for y in first for _ in range(4)]
                poison += [y.fill_(math.nan) for y in first]
                del first, poison
                check(call_set(-1))
                if device == "cuda":
                    run.facts["peak_bytes"] = peak_bytes(call_set)
                # The op loads a weight early only after a first launch has waited for it.
                for i in range(len(rotation) if provider.name == "op" else 2):
                    call_set(i)
            replay = Replay(call_set, plans[provider.workload][1], device, pool)
            with alone:
                for y in replay.outputs:
                    y.fill_(math.nan)
                replay.run()
                check(replay.outputs)
            if unique_graphs() != graphs:
                raise RuntimeError("recompiled for another input set")
            replays[provider] = replay
        except Exception as error:
            reraise_if_broken(device, error)
            errors[provider] = f"{error!r}"[:500]
    del checks
    with alone:
        timings = interleaved(replays, rounds, device)
    rows = []
    for run in runs:
        provider = run.provider
        row = case.columns(provider, N) | run.facts | {"bytes": moved[provider.workload][1]}
        rows.append(row | (timings.get(provider) or {"error": errors[provider]}))
    return rows


def compile_case(
    case: Case, rows: int, compile_one: Callable[..., Running] = compile_provider
) -> list[Running]:
    """All providers of a case, compiled on inputs of ``rows`` rows."""
    torch.manual_seed(zlib.crc32(repr(case).encode()))
    dtype, runs = getattr(torch, case.dtype), []
    hints = {w: make_set(w, case.H, rows, dtype, case.device) for w in case.workloads}
    # The first compiles share a cache: equal kernels are tuned once.
    with uncached_compiles(), fresh_cache():
        for provider in case.providers():
            with fresh_cache() if provider.draw else contextlib.nullcontext():
                runs.append(compile_one(provider, hints[provider.workload]))
    return runs
