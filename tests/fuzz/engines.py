"""Runs a program: eagerly, and compiled with the pass and without, by one of two engines.

fast: Dynamo, AOTAutograd and Inductor's passes make the graph once, with gatefuse's pass and
without; ATen runs both. full: Inductor generates code, twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._inductor import config
from torch.fx import Graph, GraphModule
from torch.utils._python_dispatch import TorchDispatchMode

import gatefuse
from tests.fuzz.inject import Inject
from tests.fuzz.programs import Case, Loaded
from tests.fuzz.rounding import Perturbed
from tests.support.comparison import _Float64
from tests.support.cuda_rewrites import emulate_coordinate_descent, pad_products
from tests.support.gradients import rewritten_gradients

__all__ = ["ENGINES", "Compiled", "Outcome", "Unusable", "run_eagerly", "run_fast", "run_full"]


@dataclass
class Outcome:
    """What the calls of a program did: outputs, inputs afterwards, gradients (None where there is
    none), and the state of the random generator at the end."""

    names: list[str] = field(default_factory=list)
    tensors: list[Tensor | None] = field(default_factory=list)
    aliases: list[int] = field(default_factory=list)
    generator: Tensor | None = None

    def drawn(self, case: Case, call: int) -> dict[str, Tensor]:
        """The random numbers among the outputs of a call."""
        return {
            name: self.tensors[self.names.index(f"{call} {name}")].detach().clone()  # type: ignore[union-attr]
            for name in case.draws
            if name in case.outputs
        }


@dataclass
class Compiled:
    """perturbed: how plain might have been rounded, made when asked for."""

    plain: Outcome
    fused: Outcome
    report: gatefuse.Report
    perturbed: Callable[[int], Outcome] | None = None


class Unusable(Exception):
    """The program fails without gatefuse."""


def _generator_state(device: str) -> Tensor:
    return torch.cuda.get_rng_state() if device != "cpu" else torch.get_rng_state()


def _call(
    outcome: Outcome, loaded: Loaded, call: int, run: Any, tensors: dict[str, Tensor], state: Any
) -> None:
    """Call the program once, differentiate it where the case says so, and note all of it."""
    case = loaded.case
    arguments = [tensors[name] for name in case.arguments]
    held = dict(zip(case.arguments, arguments))
    held |= {name: getattr(state, name) for name in case.state}
    with torch.set_grad_enabled(case.grad):
        outputs = run(*arguments)
    found: list[tuple[str, Tensor | None]] = [
        (f"{call} {name}", t) for name, t in zip(case.outputs, outputs, strict=True)
    ]
    found += [(f"{call} input {name}", t) for name, t in held.items()]
    outcome.aliases += _aliases([t for _, t in found])
    if case.grad:
        found += _gradients(case, call, outputs, held)
    for name, t in found:
        outcome.names.append(name)
        outcome.tensors.append(None if t is None else _copy(t))


def _gradients(
    case: Case, call: int, outputs: tuple[Tensor, ...], held: dict[str, Tensor]
) -> list[tuple[str, Tensor | None]]:
    roots = {name: t for name, t in zip(case.outputs, outputs) if t.requires_grad}
    leaves = {name: t for name, t in held.items() if t.requires_grad and t.is_leaf}
    if not roots or not leaves:
        return []
    generator = torch.Generator().manual_seed(1)
    # Eighths are exact in every dtype: the same cotangents for all runs, without a rounding.
    cotangents = [
        (torch.randint(-8, 9, t.shape, generator=generator) / 8).to(t.device, t.dtype)
        * case.rough.isdisjoint(name.split("."))
        for name, t in roots.items()
    ]
    gradients = torch.autograd.grad(
        list(roots.values()), list(leaves.values()), cotangents, allow_unused=True
    )
    return [(f"{call} gradient of {name}", g) for name, g in zip(leaves, gradients)]


def _copy(t: Tensor) -> Tensor:
    copied = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
    if t.numel():
        if any(s == 0 for s, n in zip(t.stride(), t.shape) if n > 1):  # as expand leaves it
            return t.detach().clone().as_strided(t.shape, t.clone().stride())
        copied.copy_(t.detach())
    return copied


def _aliases(tensors: list[Tensor | None]) -> list[int]:
    """For each tensor the place of the first one that shares its memory."""
    places: dict[int, int] = {}
    return [
        -1 if t is None or not t.numel() else places.setdefault(t.untyped_storage().data_ptr(), i)
        for i, t in enumerate(tensors)
    ]


def run_eagerly(
    loaded: Loaded,
    drawn: list[dict[str, Tensor]] | None,
    *,
    wide: bool = False,
    mode: TorchDispatchMode | None = None,
) -> Outcome:
    """The program as PyTorch runs it. drawn: the random numbers of each call, or None to draw.
    wide: in float64."""
    outcome = Outcome()
    torch.manual_seed(7)  # of all devices
    with _Float64() if wide else mode or contextlib.nullcontext():
        for call, n in enumerate(loaded.case.sizes):
            tensors = loaded.tensors(n, wide)
            replayed = None
            if drawn is not None:
                replayed = {
                    name: t.double() if wide and t.is_floating_point() else t
                    for name, t in drawn[call].items()
                }
            module = loaded.module(tensors, replayed)
            _call(outcome, loaded, call, module, tensors, module)
    return outcome


def _run_compiled(loaded: Loaded, run: Any, module: Any) -> Outcome:
    outcome = Outcome()
    torch.manual_seed(7)  # of all devices
    case = loaded.case
    other = loaded.tensors(case.sizes[0] + 1) if case.dynamic == "rows" else {}
    for call, n in enumerate(case.sizes):
        tensors = loaded.tensors(n)
        for name in case.arguments:
            if name in other:
                _mark(tensors[name], loaded.tensors(case.sizes[0])[name], other[name])
        with torch.no_grad():
            for name in case.state:
                state = getattr(module, name)
                if state.grad_fn is not None:  # written by the program, in an earlier call
                    state.detach_()
                state.copy_(tensors[name])
        _call(outcome, loaded, call, run, tensors, module)
    outcome.generator = _generator_state(loaded.device)
    return outcome


def _mark(t: Tensor, first: Tensor, second: Tensor) -> None:
    for d, (a, b) in enumerate(zip(first.shape, second.shape)):
        if a != b:
            torch._dynamo.maybe_mark_dynamic(t, d)


@contextlib.contextmanager
def _settings(case: Case) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        # On a GPU a measurement says whether to pad a product, not the same in two compiles.
        stack.enter_context(config.patch({"shape_padding": False, **case.inductor}))
        stack.enter_context(torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True))
        # How long a guard takes: a tenth of the time to compile a small program.
        stack.enter_context(
            mock.patch("torch._dynamo.guards.profile_guard_manager", return_value=0.0)
        )
        stack.enter_context(rewritten_gradients(case.grad and case.index % 2 == 0))
        if case.coordinate_descent:
            stack.enter_context(emulate_coordinate_descent())
        if case.padded_products:
            stack.enter_context(pad_products())
        torch._dynamo.reset()
        yield
    torch._dynamo.reset()


def _compile(loaded: Loaded, **arguments: Any) -> tuple[Any, Any]:
    module = loaded.module(loaded.tensors(loaded.case.sizes[0]))
    dynamic = {"": False, "rows": None, "all": True}[loaded.case.dynamic]
    return torch.compile(module, dynamic=dynamic, **arguments), module


# --- fast -------------------------------------------------------------------------------------


def run_fast(loaded: Loaded) -> Compiled:
    case = loaded.case
    fork = _Fork(case, loaded.device)
    with _settings(case), gatefuse.record() as report:
        run, module = _compile(loaded, backend=fork)
        outcomes = []
        with _not_our_fault(fork):
            outcomes.append(_run_compiled(loaded, run, module))
        fork.fused = True
        outcomes.append(_run_compiled(loaded, run, module))

        def perturbed(seed: int) -> Outcome:
            fork.fused, fork.seed = False, seed
            with _settings(case):
                return _run_compiled(loaded, *_compile(loaded, backend=fork))

        return Compiled(*outcomes, report, perturbed)


@contextlib.contextmanager
def _not_our_fault(fork: _Fork | None = None) -> Iterator[None]:
    try:
        yield
    except Exception as e:
        if fork is not None and fork.error is not None:
            raise fork.error from None
        raise Unusable(f"{type(e).__name__}: {e}") from e


@contextlib.contextmanager
def _poisoned(device: str) -> Iterator[None]:
    """On a GPU the op's own kernel writes to fresh memory, which holds NaN here."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        t = empty(*args, **kwargs)
        return t.fill_(float("nan")) if t.is_floating_point() else t

    with contextlib.nullcontext() if device == "cpu" else mock.patch("torch.empty", poisoned):
        yield


class _Fork:
    """A backend: makes each graph as Inductor does, with the pass and without, and runs one."""

    def __init__(self, case: Case, device: str) -> None:
        self.case = case
        self.device = device
        self.fused = False
        self.seed: int | None = None
        self.error: Exception | None = None
        self.passes = gatefuse.options(**case.gatefuse)["post_grad_custom_post_pass"]

    def __call__(self, module: GraphModule, inputs: list[Any]) -> Any:
        from torch._inductor.compile_fx import compile_fx

        return compile_fx(module, inputs, inner_compile=self._compile)

    def _compile(self, module: GraphModule, inputs: list[Any], **kwargs: Any) -> Any:
        from torch._inductor.compile_fx import _recursive_post_grad_passes, fake_tensor_prop
        from torch._inductor.fx_passes.post_grad import view_to_reshape
        from torch._inductor.virtualized import V

        variants = []
        view_to_reshape(module)
        with torch.no_grad():
            fake_mode = fake_tensor_prop(module, inputs)
        with V.set_fake_mode(fake_mode):
            for ours in ([], [self.passes]):
                variant = _copied(module)
                passes = [Inject(self.case.inject), *ours]
                try:
                    with config.patch(post_grad_custom_post_pass=_Sequence(passes)):
                        _recursive_post_grad_passes(variant, kwargs.get("is_inference", False))
                    variant.graph.lint()
                    _seed_draws(variant)
                except Exception as e:
                    self.error = e if ours else None
                    raise
                variants.append(variant)

        def run(args: list[Any]) -> Any:
            rounding = contextlib.nullcontext() if self.seed is None else Perturbed(self.seed)
            with _poisoned(self.device), rounding:
                return variants[self.fused](*args)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run


def _copied(module: GraphModule) -> GraphModule:
    graph = Graph()
    values: dict[Any, Any] = {}
    result = graph.graph_copy(module.graph, values)
    graph.output(result).meta = dict(module.graph.output_node().meta)
    copied = GraphModule(module, graph)
    copied.meta = dict(module.meta)
    return copied


class _Sequence:
    def __init__(self, passes: list[Callable[[Graph], None]]) -> None:
        self.passes = passes

    def __call__(self, graph: Graph) -> None:
        for each in self.passes:
            each(graph)

    def uuid(self) -> None:
        return None  # never cached


def _seed_draws(module: GraphModule) -> None:
    """Inductor's own random operators take a seed; their ATen form ignores it and draws."""
    prims = torch.ops.prims

    def generator(seed: Tensor) -> torch.Generator:
        return torch.Generator(seed.device).manual_seed(int(seed) & (1 << 62) - 1)

    def rand(size: list[int], seed: Tensor, mode: str, **_: Any) -> Tensor:
        draw = {"rand": torch.rand, "randn": torch.randn}[mode]
        return draw(size, generator=generator(seed), device=seed.device)  # type: ignore[operator]

    def randint(low: int, high: int, size: list[int], seed: Tensor) -> Tensor:
        return torch.randint(low, high, size, generator=generator(seed), device=seed.device)

    ours = {prims.inductor_random.default: rand, prims.inductor_randint.default: randint}
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target in ours:
            node.target = ours[node.target]
    module.recompile()


# --- full -------------------------------------------------------------------------------------


def run_full(loaded: Loaded) -> Compiled:
    outcomes = []
    with _not_our_fault(), _poisoned_buffers(), _settings(loaded.case):
        outcomes.append(_run_compiled(loaded, *_compile(loaded)))
    with (
        _poisoned_buffers(),
        _settings(loaded.case),
        gatefuse.fusing(**loaded.case.gatefuse) as report,
    ):
        outcomes.append(_run_compiled(loaded, *_compile(loaded)))
    return Compiled(*outcomes, report)


@contextlib.contextmanager
def _poisoned_buffers() -> Iterator[None]:
    """Memory that generated code allocates holds NaN until it is written."""
    guards = torch._C._dynamo.guards

    def poisoning(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocated(*args: Any) -> Tensor:
            t = allocate(*args)
            if t.numel():
                t.fill_(float("nan") if t.is_floating_point() else 1)
            return t

        return allocated

    names = ("_empty_strided_cpu", "_empty_strided_cuda")
    with mock.patch.multiple(guards, **{n: poisoning(getattr(guards, n)) for n in names}):
        yield


ENGINES: dict[str, Callable[[Loaded], Compiled]] = {"fast": run_fast, "full": run_full}
