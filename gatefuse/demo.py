"""`gatefuse demo`: the fusion on the model classes of transformers, with small random weights.

Each model is compiled twice, with Inductor alone and with gatefuse. The demo counts the gates in
the module tree, the fused sites and the op nodes in the graph, compares both results with eager
and with a float64 reference, and, on a GPU, measures wider models at decode and prefill sizes.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import importlib.util
import math
import re
import statistics
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import gatefuse
from gatefuse import compat, settings
from gatefuse.backend import gatefuse_backend

__all__ = ["MODELS", "DemoError", "DemoResult", "run_demo"]

MODELS = ("qwen2_moe", "qwen3_next")
"""The model types that the demo builds."""

CHECK_TOKENS = (2, 12)
"""Batch and sequence length of the comparison."""

TIMED = {"decode": ("reduce-overhead", (16, 1)), "prefill": ("default", (1, 4096))}
"""Mode of torch.compile, and batch and sequence length, of each measurement on a GPU: decode steps
are too short for the host to keep up without CUDA graphs."""

_OP_CALL = re.compile(r"torch\.ops\.gatefuse\.linear_sigmoid_mul(_logit)?\b")


class DemoError(RuntimeError):
    """The demo cannot run here; the message says what is missing."""


@dataclass
class Timing:
    """Median time of one forward pass, in milliseconds."""

    mode: str
    phase: str
    tokens: int
    inductor_ms: float
    gatefuse_ms: float


@dataclass
class Differences:
    """The largest difference over all logits, relative to the largest logit of the reference.

    ``*_vs_eager``: from the eager model; ``*_vs_fp64``: from the same weights in float64.
    """

    inductor_vs_eager: float
    gatefuse_vs_eager: float
    eager_vs_fp64: float
    inductor_vs_fp64: float
    gatefuse_vs_fp64: float

    @property
    def ratio(self) -> float:
        """gatefuse's difference from eager over Inductor's own."""
        if self.inductor_vs_eager == 0:
            return 1.0 if self.gatefuse_vs_eager == 0 else float("inf")
        return self.gatefuse_vs_eager / self.inductor_vs_eager


@dataclass
class ModelResult:
    """What the demo found in one model; problems is empty if all is well."""

    model: str
    gates: int
    sites: int
    op_nodes: int
    placements: dict[str, int]
    locations: dict[str, int]
    differences: Differences
    problems: list[str] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)


@dataclass
class DemoResult:
    """All models' results; ``passed`` is False when a gate was not fused or a result differs."""

    versions: dict[str, str]
    device: str
    dtype: str
    models: list[ModelResult]

    @property
    def passed(self) -> bool:
        return not any(m.problems for m in self.models)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        models = [dataclasses.asdict(m) for m in self.models]
        for plain, result in zip(models, self.models, strict=True):
            ratio = result.differences.ratio
            plain["differences"]["ratio"] = ratio if math.isfinite(ratio) else None
        return {
            "versions": self.versions,
            "device": self.device,
            "dtype": self.dtype,
            "passed": self.passed,
            "models": models,
        }

    def __str__(self) -> str:
        return _format(self)


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


def _config(name: str, wide: bool) -> Any:
    """A configuration of model type ``name``: tiny, or as wide as the real model with few layers
    and experts."""
    from transformers import Qwen2MoeConfig, Qwen3NextConfig

    hidden = 2048 if wide else 64
    experts = 8 if wide else 4
    sizes: dict[str, Any] = {
        "vocab_size": 256,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "moe_intermediate_size": hidden // 2,
        "shared_expert_intermediate_size": hidden,
        "num_attention_heads": 16 if wide else 4,
        "num_key_value_heads": 2,
        "num_experts": experts,
        # The comparison routes every token to every expert: were some left out, one rounding could
        # choose other experts and the results would have nothing to do with each other.
        "num_experts_per_tok": experts // 2 if wide else experts,
        "decoder_sparse_step": 1,
        "max_position_embeddings": 8192,
        # Gates far enough from one half that a wrong one is seen, and rounding errors that stay
        # small from layer to layer.
        "initializer_range": 0.02 if wide else 0.05,
        "use_cache": False,
    }
    if name == "qwen2_moe":
        return Qwen2MoeConfig(num_hidden_layers=2, **sizes)
    if name == "qwen3_next":
        # The model has three gated delta nets for each layer with attention. transformers writes
        # them as Python loops, which take most of a compilation and, without kernels of their own,
        # of a forward pass: one is enough for the comparison, and none is timed.
        kinds = ("full_attention" if wide else "linear_attention", "full_attention")
        return Qwen3NextConfig(
            num_hidden_layers=len(kinds),
            layer_types=list(kinds),
            head_dim=128 if wide else 16,
            linear_num_key_heads=16 if wide else 2,
            linear_num_value_heads=32 if wide else 4,
            linear_key_head_dim=128 if wide else 16,
            linear_value_head_dim=128 if wide else 16,
            **sizes,
        )
    raise ValueError(f"unknown model {name!r}; the models are {', '.join(MODELS)}")


def _model(name: str, wide: bool, device: torch.device, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(_config(name, wide), dtype=dtype)
    model = model.to(device).eval()
    # transformers falls back to a Python loop over the experts that were hit, which breaks the
    # graph, where it finds no grouped matrix product.
    if getattr(model.config, "_experts_implementation", None) == "eager":
        model.set_experts_implementation("batched_mm")
    return model


def _gates(model: nn.Module) -> int:
    return sum(
        isinstance(module, nn.Linear)
        and module.out_features == 1
        and path.endswith("shared_expert_gate")
        for path, module in model.named_modules()
    )


@contextlib.contextmanager
def _fresh_compilation() -> Iterator[None]:
    """Compile anew inside: a graph from a cache would have no sites to tell of. Kernels that were
    built before are reused."""
    torch.compiler.reset()
    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No advice from transformers, Dynamo and Inductor on how transformers is written or installed
    and what Inductor makes of it."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            for message in (
                "Dynamo detected a call to a `functools",
                r"\s*Online softmax is disabled on the fly",
                "TensorFloat32 tensor cores for float32 matrix multiplication",
            ):
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        logging.set_verbosity(verbosity)


def _forward(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def _max(t: Tensor) -> float:
    return t.abs().max().item()


def _rms(t: Tensor) -> float:
    return t.square().mean().sqrt().item()


def _differences(
    eager: Tensor, inductor: Tensor, fused: Tensor, reference: Tensor, dtype: torch.dtype
) -> tuple[Differences, list[str]]:
    """The differences, and what is wrong with them.

    The fused model may be at most twice as far from the float64 reference as eager is, plus one
    unit of ``dtype`` at the size of the reference, on the worst element and in the mean.
    """
    eager, inductor, fused = eager.double(), inductor.double(), fused.double()
    scale = _max(reference)
    found = Differences(
        inductor_vs_eager=_max(inductor - eager) / scale,
        gatefuse_vs_eager=_max(fused - eager) / scale,
        eager_vs_fp64=_max(eager - reference) / scale,
        inductor_vs_fp64=_max(inductor - reference) / scale,
        gatefuse_vs_fp64=_max(fused - reference) / scale,
    )
    problems = []
    if not torch.isfinite(fused).all():
        problems.append("the fused result is not finite")
    for what, measure in (("worst element", _max), ("root mean square", _rms)):
        bound = 2 * measure(eager - reference) + torch.finfo(dtype).eps * measure(reference)
        got = measure(fused - reference)
        if not got <= bound:
            problems.append(f"the fused result differs: {what} {got:.2e} > {bound:.2e}")
    return found, problems


def _backend() -> Any:
    """The backend's name, or the backend itself where gatefuse is not installed but only found."""
    names = torch._dynamo.list_backends(exclude_tags=())
    return "gatefuse" if "gatefuse" in names else gatefuse_backend


def _check(name: str, device: torch.device, dtype: torch.dtype) -> ModelResult:
    model = _model(name, wide=False, device=device, dtype=dtype)
    ids = torch.randint(0, model.config.vocab_size, CHECK_TOKENS, device=device)
    reference_model = copy.deepcopy(model).double()
    reference_model.set_experts_implementation("eager")
    reference = _forward(reference_model, ids)
    eager = _forward(model, ids)
    with _fresh_compilation():
        inductor = _forward(torch.compile(model, fullgraph=True), ids)
    with _fresh_compilation(), gatefuse.record() as report:
        fused = _forward(torch.compile(model, backend=_backend(), fullgraph=True), ids)

    differences, problems = _differences(eager, inductor, fused, reference, dtype)
    gates = _gates(model)
    op_nodes = sum(len(_OP_CALL.findall(g.after or "")) for g in report.graphs)
    sites = [site for graph in report.graphs for site in graph.sites]
    rejections = [rejection for graph in report.graphs for rejection in graph.rejections]
    if report.fused != gates:
        problems.insert(0, f"{report.fused} of {gates} gates were fused")
        if settings.disabled_by_environment():
            problems.append("GATEFUSE_DISABLE is set")
        if (reason := compat.unsupported_reason()) is not None:
            problems.append(reason)
        problems += [f"{r.node} was left alone: {r.reason}" for r in rejections]
    if op_nodes != report.fused:
        problems.append(f"{report.fused} sites, but {op_nodes} op nodes in the graph")
    return ModelResult(
        model=name,
        gates=gates,
        sites=report.fused,
        op_nodes=op_nodes,
        placements=dict(Counter(site.placement or "unknown" for site in sites)),
        locations=dict(Counter(site.location or "unknown" for site in sites)),
        differences=differences,
        problems=problems,
    )


def _median_ms(
    calls: Sequence[Callable[[], object]], device: torch.device, repeats: int = 50
) -> list[float]:
    """Median device time of each call in milliseconds, measured in turns."""
    module = torch.get_device_module(device.type)
    for call in calls:
        for _ in range(5):
            call()
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
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
    model = _model(name, wide=True, device=device, dtype=torch.bfloat16)
    timings = []
    for phase, (mode, (batch, length)) in TIMED.items():
        say(f"{name}: measuring {phase}, {batch * length} tokens, mode {mode}")
        ids = torch.randint(0, model.config.vocab_size, (batch, length), device=device)
        torch.compiler.reset()
        inductor = torch.compile(model, mode=mode, fullgraph=True, dynamic=False)
        fused = torch.compile(model, backend=_backend(), mode=mode, fullgraph=True, dynamic=False)
        calls = [functools.partial(_forward, compiled, ids) for compiled in (inductor, fused)]
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
    with torch.no_grad(), _quiet():
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
        label = f"{device} ({torch.cuda.get_device_name(device)})"
    versions = {
        "gatefuse": gatefuse.__version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }
    return DemoResult(versions, label, str(dtype).removeprefix("torch."), results)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a plain-text table; the first column is flush left, the others flush right.

    A header cell may have two lines.
    """
    heads = [(["", *cell.split("\n")])[-2:] for cell in header]
    above, below = zip(*heads, strict=True)
    widths = [max(map(len, column)) for column in zip(above, below, *rows, strict=True)]
    lines = []
    for row in (above, below, ["-" * width for width in widths], *rows):
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines if lines[0] else lines[1:]


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} {what}" for what, n in sorted(counts.items())) or "none"


def _format(result: DemoResult) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    lines = [f"{versions}; {result.device}, {result.dtype}", ""]
    lines += _table(
        ("model", "gates", "sites", "op nodes", "placed", "verdict"),
        [
            (
                m.model,
                str(m.gates),
                str(m.sites),
                str(m.op_nodes),
                _counts(m.placements),
                "FAILED" if m.problems else "ok",
            )
            for m in result.models
        ],
    )
    lines += ["", "largest difference of the logits, relative to the largest logit", ""]
    lines += _table(
        (
            "model",
            "Inductor\nvs eager",
            "gatefuse\nvs eager",
            "ratio",
            "eager\nvs fp64",
            "Inductor\nvs fp64",
            "gatefuse\nvs fp64",
        ),
        [
            (
                m.model,
                f"{m.differences.inductor_vs_eager:.2e}",
                f"{m.differences.gatefuse_vs_eager:.2e}",
                f"{m.differences.ratio:.2f}",
                f"{m.differences.eager_vs_fp64:.2e}",
                f"{m.differences.inductor_vs_fp64:.2e}",
                f"{m.differences.gatefuse_vs_fp64:.2e}",
            )
            for m in result.models
        ],
    )
    if any(m.locations for m in result.models):
        lines += ["", "where the gates are"]
    for m in result.models:
        lines += [f"  {m.model}: {n} x {where}" for where, n in sorted(m.locations.items())]
    if any(m.timings for m in result.models):
        lines += ["", "median time of a forward pass of a wider model, bfloat16, ms", ""]
        lines += _table(
            ("model", "mode", "phase", "tokens", "Inductor", "gatefuse", "ratio"),
            [
                (
                    m.model,
                    t.mode,
                    t.phase,
                    str(t.tokens),
                    f"{t.inductor_ms:.3f}",
                    f"{t.gatefuse_ms:.3f}",
                    f"{t.gatefuse_ms / t.inductor_ms:.3f}",
                )
                for m in result.models
                for t in m.timings
            ],
        )
    lines.append("")
    for m in result.models:
        lines += [f"{m.model}: {problem}" for problem in m.problems]
    lines.append(
        "Every gate is fused and every result is as near to the float64 reference as eager's."
        if result.passed
        else "FAILED"
    )
    return "\n".join(lines)
