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
from harness import run_python

from gatefuse.integrations import vllm_count, vllm_hoist


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
def lora(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A stand-in for vLLM's current configuration."""
    config = SimpleNamespace(lora_config=None)
    module = types.ModuleType("vllm.config")
    module.get_current_vllm_config = lambda: config  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", types.ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.config", module)
    return config


def test_hoisted_gate_gives_the_same_result() -> None:
    gate, x, routed = Gate(), torch.randn(3, 8), torch.randn(3, 8)
    expert = Expert(gate)
    runner = Runner("layer", expert)
    before = runner.forward(routed, None, x)
    vllm_hoist._hoist(runner, expert)
    assert expert.expert_gate is None
    assert torch.equal(runner.forward(routed, None, x), before)


def test_known_runner() -> None:
    assert vllm_hoist._runner_problem(Runner) is None
    assert "_forward_entry" in str(vllm_hoist._runner_problem(OtherRunner))
    assert "shared expert" in str(vllm_hoist._runner_problem(Expert))


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
    lora: SimpleNamespace, reason: str | None, runner: Any, expert: Any, held: bool
) -> None:
    problem = vllm_hoist._layer_problem(runner, Runner, expert, held)
    assert problem is None if reason is None else reason in str(problem)


def test_lora_is_left(lora: SimpleNamespace) -> None:
    lora.lora_config = object()
    problem = vllm_hoist._layer_problem(Runner("l", None), Runner, Expert(Gate()), False)
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
    assert vllm_hoist._compiles(config) is compiles


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

    assert vllm_count.fused_in(runnable) == Counter(fused=2, inline=2, kernel=0)
    assert vllm_count.fused_in(lambda: None)["fused"] == 0


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
