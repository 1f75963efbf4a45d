"""What gatefuse decides about vLLM's classes, on stand-ins; tests/vllm_cpu has the real ones."""

from __future__ import annotations

import sys
import types
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from gatefuse import FusionError, Options
from gatefuse.integrations.vllm import fusion_count, moe_runner, passes
from tests.support.programs import run_python


class Expert:
    """As Qwen2MoeMLP ends."""

    def __init__(self, gate: Any) -> None:
        self.expert_gate = gate

    def forward(self, x: Any) -> Any:
        out = self.down_proj(x)

        if self.expert_gate is not None:
            out = F.sigmoid(self.expert_gate(x)[0]) * out

        return out

    def down_proj(self, x: Any) -> Any:
        return 2 * x


class ScaledExpert(Expert):
    def forward(self, x: Any) -> Any:
        out = self.down_proj(x)

        if self.expert_gate is not None:
            out = F.sigmoid(self.expert_gate(x)[0]) * out

        return 3 * out


def _unpack(result: Any) -> Any:
    return result


class Runner:
    """As vLLM's MoERunner calls its op."""

    def __init__(
        self, layer_name: str, shared_experts: Any, sequence_parallel: bool = False
    ) -> None:
        self.layer_name = layer_name
        self.shared = shared_experts
        self.moe_config = SimpleNamespace(is_sequence_parallel=sequence_parallel)
        self._forward_entry = self._op

    def _op(self, hidden_states: Any, router_logits: Any, shared_experts_input: Any) -> Any:
        return self.shared.forward(shared_experts_input), hidden_states

    def forward(self, hidden_states: Any, router_logits: Any, shared_experts_input: Any) -> Any:
        result = self._forward_entry(
            hidden_states,
            router_logits,
            shared_experts_input,
        )
        shared_output, fused_output = _unpack(result)
        return shared_output + fused_output


class OtherRunner(Runner):
    def forward(self, hidden_states: Any, router_logits: Any, shared_experts_input: Any) -> Any:
        return self._op(hidden_states, router_logits, shared_experts_input)[0]


class Gate(torch.nn.Module):
    def __init__(
        self, rows: int = 1, bias: bool = False, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(rows, 8).to(dtype), requires_grad=False)
        self.bias = torch.nn.Parameter(torch.zeros(rows)) if bias else None

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return F.linear(x, self.weight, self.bias), None


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A stand-in for vLLM's current configuration."""
    config = SimpleNamespace(lora_config=None, envs=SimpleNamespace(VLLM_BATCH_INVARIANT=False))
    module = types.ModuleType("vllm.config")
    module.get_current_vllm_config = lambda: config  # type: ignore[attr-defined]
    package = types.ModuleType("vllm")
    package.envs = config.envs  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", package)
    monkeypatch.setitem(sys.modules, "vllm.config", module)
    return config


def test_hoisted_gate_gives_the_same_result() -> None:
    gate, x, routed = Gate(), torch.randn(3, 8), torch.randn(3, 8)
    expert = Expert(gate)
    runner = Runner("layer", expert)
    before = runner.forward(routed, None, x)
    moe_runner._hoist(runner, expert)
    assert expert.expert_gate is None
    assert torch.equal(runner.forward(routed, None, x), before)


def test_weight_of_a_hoisted_gate_is_kept_where_vllm_packs_it() -> None:
    class Packs:
        def process_weights_after_loading(self, layer: Any) -> None:
            layer.packed = layer.weight
            layer.weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)

    gate, x = Gate(), torch.randn(3, 8)
    gate.quant_method = Packs()
    expert = Expert(gate)
    runner = Runner("layer", expert)
    before = runner.forward(x, None, x)
    moe_runner._hoist(runner, expert)
    gate.quant_method.process_weights_after_loading(gate)
    assert gate.packed is gate.weight
    assert torch.equal(runner.forward(x, None, x), before)


def test_known_runner() -> None:
    assert moe_runner._runner_problem(Runner) is None
    assert "_forward_entry" in str(moe_runner._runner_problem(OtherRunner))
    assert "shared expert" in str(moe_runner._runner_problem(Expert))


@pytest.mark.parametrize(
    "reason, runner, expert, held",
    [
        (None, Runner("l", Expert(Gate())), Expert(Gate()), False),
        ("router", Runner("l", None), None, True),
        ("ways of its own", OtherRunner("l", None), Expert(Gate()), False),
        ("does not end", Runner("l", None), ScaledExpert(Gate()), False),
        ("one row", Runner("l", None), Expert(Gate(rows=8)), False),
        ("bias", Runner("l", None), Expert(Gate(bias=True)), False),
        ("quantised", Runner("l", None), Expert(Gate(dtype=torch.int8)), False),
        ("sequence parallel", Runner("l", None, True), Expert(Gate()), False),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_layers_that_are_left(
    engine: SimpleNamespace, reason: str | None, runner: Any, expert: Any, held: bool
) -> None:
    problem = moe_runner._layer_problem(runner, Runner, expert, held)
    assert problem is None if reason is None else reason in str(problem)


def test_engines_that_are_left(engine: SimpleNamespace) -> None:
    engine.envs.VLLM_BATCH_INVARIANT = True
    problem = moe_runner._layer_problem(Runner("l", None), Runner, Expert(Gate()), False)
    assert "batch invariance" in str(problem)
    engine.lora_config = object()
    problem = moe_runner._layer_problem(Runner("l", None), Runner, Expert(Gate()), False)
    assert "LoRA" in str(problem)


@pytest.mark.parametrize(
    "mode, backend, compiles",
    [
        ("VLLM_COMPILE", "inductor", True),
        ("DYNAMO_TRACE_ONCE", "inductor", True),
        ("VLLM_COMPILE", "eager", False),
        ("STOCK_TORCH_COMPILE", "inductor", False),
        ("NONE", "inductor", False),
    ],
)
def test_engines_that_compile(mode: str, backend: str, compiles: bool) -> None:
    config = SimpleNamespace(mode=SimpleNamespace(name=mode), backend=backend)
    assert moe_runner._compiles(config) is compiles


def test_count_of_compiled_code() -> None:
    """Found behind closures, methods and partials; a copy of the artifact does not count twice."""

    class Compiled:
        def __init__(self) -> None:
            self.counter_deltas = Counter(gatefuse_fused=2, gatefuse_inline=2)

        def __call__(self) -> None: ...

    class Artifact:
        def __init__(self) -> None:
            self.entry = {"copies": [Compiled()]}
            self.inner = Compiled()

    artifact = Artifact()

    def runnable() -> Any:
        return artifact

    assert fusion_count.fused_in(runnable) == Counter(fused=2, inline=2, kernel=0)
    assert fusion_count.fused_in(lambda: None)["fused"] == 0


class Worker:
    """As vLLM's workers look to the count; its compiled pieces are counted already."""

    def __init__(self, *models: Counter[str], rank: int = 0) -> None:
        self.model_runner = SimpleNamespace(model=None)
        self.vllm_config = SimpleNamespace(
            compilation_config=SimpleNamespace(),
            parallel_config=SimpleNamespace(rank=rank),
        )
        key = id(self.vllm_config.compilation_config)
        fusion_count._counted[key] = {str(i): model for i, model in enumerate(models)}


def fused(n: int, placement: str = "inline") -> Counter[str]:
    return Counter({"fused": n, placement: n})


@pytest.fixture
def tell(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Any:
    """Tells of a worker, with a number of gates that were hoisted and left; returns the lines."""

    def tell(worker: Worker, hoisted: int, left: int = 0, expect: int = 0) -> list[str]:
        graph_pass = SimpleNamespace(hoisted=["layer"] * hoisted, options=Options(expect=expect))
        monkeypatch.setattr(passes, "pass_of", lambda config: graph_pass if hoisted else None)
        monkeypatch.setattr(fusion_count, "left_alone", lambda config: left)
        caplog.clear()
        with caplog.at_level("INFO", "vllm.gatefuse"):
            fusion_count._tell(worker)
        return caplog.messages

    yield tell
    fusion_count._counted.clear()


def test_line_of_an_engine(tell: Any) -> None:
    """A model and its draft model are one engine; gates that were left are part of the total."""
    assert tell(Worker(fused(3)), 3) == [
        "gatefuse: 3 of 3 shared-expert gates fused (placement inline)"
    ]
    assert tell(Worker(fused(3), fused(1, "kernel")), 4, left=2) == [
        "gatefuse: 4 of 6 shared-expert gates fused (placement 3 inline, 1 kernel)"
    ]
    assert tell(Worker(), 0, left=2) == [
        "gatefuse: 0 of 2 shared-expert gates fused (placement none)"
    ]
    assert tell(Worker(), 0) == []
    assert tell(Worker(fused(3), rank=1), 3) == []


def test_expect_of_an_engine(tell: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tell(Worker(fused(2), fused(1)), 3, expect=3)
    with pytest.raises(FusionError, match="expected at least 4 fused gates in the engine, fused 3"):
        tell(Worker(fused(2), fused(1)), 4, expect=4)
    monkeypatch.setenv("GATEFUSE_EXPECT", "1")
    with pytest.raises(FusionError, match="fused 0"):
        tell(Worker(), 0, left=2)


def test_start_of_a_worker_is_told_once() -> None:
    """Also where a worker's method calls that of its super class, and both are followed."""

    class Base:
        def start(self) -> str:
            return "started"

    class Derived(Base):
        def start(self) -> str:
            return super().start()

    told: list[Any] = []
    for owner in (Base, Derived):
        fusion_count._after(owner, "start", told.append)
    base, derived = Base(), Derived()
    assert base.start() == derived.start() == "started"
    assert told == [base, derived]


def test_count_of_a_model_that_is_compiled_as_a_whole() -> None:
    """With and without ahead-of-time compilation; what vLLM does not compile counts nothing."""

    class Compiled:
        counter_deltas: Counter[str]

        def __init__(self, n: int) -> None:
            self.counter_deltas = Counter(gatefuse_fused=n, gatefuse_inline=n)

    class Model(torch.nn.Module):
        pass

    ahead, lazy = Model(), Model()
    ahead.do_not_compile = lazy.do_not_compile = False
    ahead.aot_compiled_fn = [Compiled(2)]
    variables: dict[str, Any] = {"__compiled_fn_0": [Compiled(3)], "other": Compiled(9)}
    exec("def forward(self): ...", variables)
    Model.forward = variables["forward"]
    left = torch.nn.Linear(1, 1)
    runner = SimpleNamespace(
        model=torch.nn.ModuleList([left, ahead]), drafter=SimpleNamespace(model=lazy)
    )
    counted = fusion_count._of_whole_models(SimpleNamespace(model_runner=runner))
    assert [c["fused"] for c in counted] == [2, 3]


def test_plugin_imports_no_vllm() -> None:
    """Registering only waits for vLLM's MoE runner; turned off, it does not even that."""
    code = """
        import sys
        from gatefuse.integrations.vllm import register
        before = list(sys.meta_path)
        register()
        register()
        print(len(sys.meta_path) - len(before), any(m.split(".")[0] == "vllm" for m in sys.modules))
    """
    assert run_python(code).stdout.split() == ["1", "False"]
    assert run_python(code, GATEFUSE_DISABLE="1").stdout.split() == ["0", "False"]
