"""`gatefuse demo`: the fusion on the model classes of transformers, with small random weights.

Each model is compiled twice, with Inductor alone and with gatefuse. The demo counts the gates in
the module tree, the fused sites and the op nodes in the graph, compares both results with eager
and with a float64 reference, and, on a GPU, measures wider models at decode and prefill sizes.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import re
import statistics
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import gatefuse
from gatefuse import compat, settings
from gatefuse.backend import gatefuse_backend
from gatefuse.bench.measure import norms, uncached_compiles
from gatefuse.demo.models import MODELS, build, count_gates, forward, quiet
from gatefuse.demo.result import DemoResult, Differences, ModelResult, Timing

__all__ = ["MODELS", "DemoError", "DemoResult", "run_demo"]

CHECK_TOKENS = (2, 12)
"""Batch and sequence length of the comparison."""

TIMED = {"decode": ("reduce-overhead", (16, 1)), "prefill": ("default", (1, 4096))}
"""Mode of torch.compile, and batch and sequence length, of each measurement on a GPU: decode steps
are too short for the host to keep up without CUDA graphs."""

_OP_CALL = re.compile(r"torch\.ops\.gatefuse\.linear_sigmoid_mul(_logit)?\b")


class DemoError(RuntimeError):
    """The demo cannot run here; the message says what is missing."""


def _require_transformers() -> None:
    if importlib.util.find_spec("transformers") is None:
        raise DemoError(
            "the demo needs transformers, which is not installed: pip install 'gatefuse[demo]'"
        )
    import transformers

    if int(transformers.__version__.split(".")[0]) < 5:
        raise DemoError(
            f"the demo needs transformers 5 or later, found {transformers.__version__}: "
            "pip install -U 'gatefuse[demo]'"
        )


def _differences(
    eager: Tensor, inductor: Tensor, fused: Tensor, reference: Tensor, dtype: torch.dtype
) -> tuple[Differences, list[str]]:
    """The differences, and what is wrong with them.

    The fused model may be at most twice as far from the float64 reference as eager is, plus one
    unit of ``dtype`` at the size of the reference, on the worst element and in the mean.
    """
    eager, inductor, fused = eager.double(), inductor.double(), fused.double()

    def worst(result: Tensor, other: Tensor) -> float:
        return norms(result - other)[1] / norms(reference)[1]

    found = Differences(
        inductor_vs_eager=worst(inductor, eager),
        gatefuse_vs_eager=worst(fused, eager),
        eager_vs_fp64=worst(eager, reference),
        inductor_vs_fp64=worst(inductor, reference),
        gatefuse_vs_fp64=worst(fused, reference),
    )
    problems = []
    if not torch.isfinite(fused).all():
        problems.append("the fused result is not finite")
    sizes = [norms(t) for t in (fused - reference, eager - reference, reference)]
    for what, i in (("worst element", 1), ("root mean square", 0)):
        got, by_eager, size = (each[i] for each in sizes)
        if not got <= (bound := 2 * by_eager + torch.finfo(dtype).eps * size):
            problems.append(f"the fused result differs: {what} {got:.2e} > {bound:.2e}")
    return found, problems


def _check(name: str, device: torch.device, dtype: torch.dtype) -> ModelResult:
    model = build(name, wide=False, device=device, dtype=dtype)
    ids = torch.randint(0, model.config.vocab_size, CHECK_TOKENS, device=device)
    reference_model = copy.deepcopy(model).double()
    reference_model.set_experts_implementation("eager")
    reference = forward(reference_model, ids)
    eager = forward(model, ids)
    with uncached_compiles():
        inductor = forward(torch.compile(model, fullgraph=True), ids)
    with uncached_compiles(), gatefuse.record() as report:
        fused = forward(torch.compile(model, backend=gatefuse_backend, fullgraph=True), ids)

    differences, problems = _differences(eager, inductor, fused, reference, dtype)
    gates = count_gates(model)
    op_nodes = sum(len(_OP_CALL.findall(g.after or "")) for g in report.graphs)
    if report.fused != gates:
        problems.insert(0, f"{report.fused} of {gates} gates were fused")
        if settings.disabled_by_environment():
            problems.append("GATEFUSE_DISABLE is set")
        if (reason := compat.unsupported_reason()) is not None:
            problems.append(reason)
        problems += [f"{r.node} was left alone: {r.reason}" for r in report.rejections]
    if op_nodes != report.fused:
        problems.append(f"{report.fused} sites, but {op_nodes} op nodes in the graph")
    return ModelResult(
        model=name,
        gates=gates,
        sites=report.fused,
        op_nodes=op_nodes,
        placements=dict(Counter(site.placement or "unknown" for site in report.sites)),
        locations=dict(Counter(site.location or "unknown" for site in report.sites)),
        differences=differences,
        problems=problems,
    )


def _median_ms(calls: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """Median device time of each call in milliseconds, measured in turns."""
    module = torch.get_device_module(device.type)
    for call in calls:
        for _ in range(5):
            call()
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(50):
        for call, found in zip(calls, times, strict=True):
            start, end = module.Event(enable_timing=True), module.Event(enable_timing=True)
            module.synchronize(device)
            start.record()
            call()
            end.record()
            module.synchronize(device)
            found.append(start.elapsed_time(end))
    return [statistics.median(found) for found in times]


def _time(name: str, device: torch.device, say: Callable[[str], None]) -> list[Timing]:
    model = build(name, wide=True, device=device, dtype=torch.bfloat16)
    timings = []
    for phase, (mode, (batch, length)) in TIMED.items():
        say(f"{name}: measuring {phase}, {batch * length} tokens, mode {mode}")
        ids = torch.randint(0, model.config.vocab_size, (batch, length), device=device)
        torch.compiler.reset()
        inductor = torch.compile(model, mode=mode, fullgraph=True, dynamic=False)
        fused = torch.compile(
            model, backend=gatefuse_backend, mode=mode, fullgraph=True, dynamic=False
        )
        calls = [functools.partial(forward, compiled, ids) for compiled in (inductor, fused)]
        timings.append(Timing(mode, phase, batch * length, *_median_ms(calls, device)))
    return timings


def _missing_to_compile(error: BaseException) -> str | None:
    """What the machine lacks if Inductor could not compile its C++, or None."""
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    if isinstance(error, InvalidCxxCompiler):
        return "PyTorch finds no C++ compiler; install g++ or clang++, or name one in CXX"
    if isinstance(error, CppCompileError) and "Python.h" in str(error):
        return "the C++ compiler finds no Python.h; install Python's headers (python3-dev)"
    return None


def run_demo(
    device: str | torch.device | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    models: Sequence[str] = MODELS,
    measure: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> DemoResult:
    """Compile ``models`` with and without gatefuse on ``device`` and compare.

    device: by default the GPU if there is one. dtype: of the compared models. measure: also time
    wider bfloat16 models, on a GPU only. say: called with a line on what is going on.

    Raises DemoError where transformers, the device or a C++ compiler is missing, or a model's graph
    breaks.
    """
    _require_transformers()
    import transformers

    if device is None:
        device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise DemoError(f"{device!r} is not a device: cpu, cuda, cuda:1, xpu") from error
    if device.type != "cpu":
        module = getattr(torch, device.type, None)
        if module is None or (device.index or 0) >= module.device_count():
            raise DemoError(f"PyTorch {torch.__version__} finds no device {device} here")

    results = []
    with torch.no_grad(), quiet():
        for name in models:
            say(f"{name}: compiling with Inductor alone and with gatefuse")
            try:
                result = _check(name, device, dtype)
                if measure and device.type != "cpu":
                    result.timings = _time(name, device, say)
            except torch._dynamo.exc.Unsupported as error:
                reason = str(error).strip().splitlines()[0]
                raise DemoError(f"{name} does not compile to one graph here: {reason}") from error
            except torch._dynamo.exc.BackendCompilerFailed as error:
                if (missing := _missing_to_compile(error.inner_exception)) is None:
                    raise
                raise DemoError(missing) from error
            results.append(result)
    torch.compiler.reset()
    label = str(device)
    if device.type == "cuda":
        label += f" ({torch.cuda.get_device_name(device)})"
    versions = {
        "gatefuse": gatefuse.__version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }
    return DemoResult(versions, label, str(dtype).removeprefix("torch."), results)
