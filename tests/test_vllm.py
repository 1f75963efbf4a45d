"""What gatefuse decides about vLLM's classes, on stand-ins; tests/vllm_cpu has the real ones."""

from __future__ import annotations

import functools
import importlib
import sys
import types
from abc import ABC
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F

from gatefuse import FusionError, Options
from gatefuse.integrations.vllm import (
    compiled_models,
    fusion_count,
    moe_runner,
    passes,
    shared_expert,
)
from tests.support.programs import run_python


class Linear(torch.nn.Module):
    """Returns a bias beside its output, as vLLM's do."""

    def __init__(self, rows: int = 1) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(rows, 8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return F.linear(x, self.weight), None


class Expert(torch.nn.Module):
    """As Qwen2MoeMLP ends."""

    def __init__(self, gate: Any = None) -> None:
        super().__init__()
        self.down_proj = Linear(8)
        self.expert_gate = Linear() if gate is None else gate

    def forward(self, x: Any) -> Any:
        out, _ = self.down_proj(x)

        if self.expert_gate is not None:
            out = F.sigmoid(self.expert_gate(x)[0]) * out

        return out


class TorchSigmoid(Expert):
    def forward(self, x: Any) -> Any:
        out, _ = self.down_proj(x)
        if self.expert_gate is not None:
            # a remark, a line break, the other order
            scale = torch.sigmoid(self.expert_gate(x)[0])
            out = (
                out
                * scale
            )  # fmt: skip
        return out


class EarlyReturn(Expert):
    def forward(self, x: Any) -> Any:
        out, _ = self.down_proj(x)
        if self.expert_gate is None:
            return out
        logit, _ = self.expert_gate(x)
        out *= logit.sigmoid()
        return out


class PlainLinear(Expert):
    """A gate that returns no tuple, and a module for the sigmoid."""

    def __init__(self) -> None:
        super().__init__(torch.nn.Linear(8, 1, bias=False))
        self.act = torch.nn.Sigmoid()

    def forward(self, hidden_states: Any) -> Any:
        gate = self.expert_gate
        out = self.down_proj(hidden_states)[0]
        return out if gate is None else torch.mul(self.act(gate(hidden_states)), out)


class ScaledAfterwards(Expert):
    def forward(self, x: Any) -> Any:
        return 3 * super().forward(x)


class GatedBefore(Expert):
    def forward(self, x: Any) -> Any:
        if self.expert_gate is not None:
            x = F.sigmoid(self.expert_gate(x)[0]) * x
        return self.down_proj(x)[0]


class GateOfSomethingElse(Expert):
    def forward(self, x: Any) -> Any:
        out, _ = self.down_proj(x)
        if self.expert_gate is not None:
            out = F.sigmoid(self.expert_gate(2 * x)[0]) * out
        return out


class OtherwiseUngated(Expert):
    def forward(self, x: Any) -> Any:
        out, _ = self.down_proj(x)
        if self.expert_gate is not None:
            return F.sigmoid(self.expert_gate(x)[0]) * out
        return out + x


class NotOptional(Expert):
    def forward(self, x: Any) -> Any:
        return F.sigmoid(self.expert_gate(x)[0]) * self.down_proj(x)[0]


class Tanh(Expert):
    def forward(self, x: Any) -> Any:
        out, _ = self.down_proj(x)
        return out if self.expert_gate is None else torch.tanh(self.expert_gate(x)[0]) * out


class DependsOnValues(Expert):
    def forward(self, x: Any) -> Any:
        return super().forward(x) if x.sum() > 0 else x


@pytest.mark.parametrize("kind", [Expert, TorchSigmoid, EarlyReturn, PlainLinear])
def test_a_gate_that_is_the_last_step(kind: Any) -> None:
    expert = kind()
    gate = expert.expert_gate
    assert list(shared_expert.gate_names(expert)) == ["expert_gate"]
    assert shared_expert.problem_of(expert, "expert_gate") is None
    assert expert.expert_gate is gate, "it is only looked at"


@pytest.mark.parametrize(
    "kind, reason",
    [
        (ScaledAfterwards, "does not end with the gate"),
        (GatedBefore, "does not end with the gate"),
        (GateOfSomethingElse, "does not end with the gate"),
        (OtherwiseUngated, "does not end with the gate"),
        (Tanh, "does not end with the gate"),
        (NotOptional, "cannot be traced"),
        (DependsOnValues, "cannot be traced"),
    ],
)
def test_a_gate_that_cannot_be_hoisted(kind: Any, reason: str) -> None:
    expert = kind()
    assert reason in str(shared_expert.problem_of(expert, "expert_gate"))
    assert expert.expert_gate is not None


class Pluggable(torch.nn.Module):
    """As vLLM's PluggableLayer."""

    registry: ClassVar[dict[str, Any]] = {}

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return super().__new__(cls.registry.get(cls.__name__, cls))

    @classmethod
    def register_oot(cls, other: Any) -> None:
        assert cls.__name__ not in cls.registry
        cls.registry[cls.__name__] = other


class Runner(Pluggable, ABC):
    """As vLLM's MoERunner calls its op."""

    def __init__(self, shared_experts: Any = None) -> None:
        super().__init__()
        self.shared = shared_experts
        self._forward_entry = self._select_forward()

    def _select_forward(self) -> Any:
        return self._op

    def _op(self, hidden_states: Any, router_logits: Any, shared_experts_input: Any) -> Any:
        x = hidden_states if shared_experts_input is None else shared_experts_input
        return self.shared(x), hidden_states

    def forward(self, hidden_states: Any, router_logits: Any, shared_experts_input: Any) -> Any:
        shared, fused = self._forward_entry(hidden_states, router_logits, shared_experts_input)
        return shared + fused


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Runners of gatefuse's that were made."""
    made: list[Any] = []
    monkeypatch.setattr(compiled_models, "runner_made", lambda *args: made.append(args))
    monkeypatch.setattr(Pluggable, "registry", {})
    return made


def test_hoisted_gate_gives_the_same_result(made: list[Any]) -> None:
    """Of a runner that does what vLLM's does until then."""
    x, routed, expert = torch.randn(3, 8), torch.randn(3, 8), Expert()
    gate = expert.expert_gate
    runner = moe_runner.gate_hoisting(Runner)(expert)
    assert made == [(runner, expert, None)]
    before, alone = runner(routed, None, x), runner(routed, None, None)
    parameters = set(dict(runner.named_parameters()))
    runner.hoist(expert, "expert_gate")
    assert expert.expert_gate is None
    assert torch.equal(runner(routed, None, x), before)
    assert torch.equal(runner(routed, None, None), alone)
    gate.weight.data.zero_()
    assert torch.equal(runner(routed, None, x), 0.5 * expert(x) + routed), "of the gate as it is"
    assert set(dict(runner.named_parameters())) == parameters - {"shared.expert_gate.weight"}


def test_a_runner_that_calls_the_op_in_another_way(made: list[Any]) -> None:
    """Nothing is hoisted, or the gate would be lost."""

    class Renamed(Runner):
        def __init__(self, shared_experts: Any = None) -> None:
            super().__init__(shared_experts)
            self._entry = self.__dict__.pop("_forward_entry")

    expert = Expert()
    runner = moe_runner.gate_hoisting(Renamed)(expert)
    with pytest.raises(RuntimeError, match="another way"):
        runner.hoist(expert, "expert_gate")
    assert expert.expert_gate is not None


def test_rows_may_be_a_part_of_the_batch(made: list[Any]) -> None:
    """Sequence-parallel layers call the runner with the rows of one rank: each row has its gate."""
    x, routed, expert = torch.randn(8, 8), torch.randn(8, 8), Expert()
    runner = moe_runner.gate_hoisting(Runner)(expert)
    before = runner(routed, None, x)
    runner.hoist(expert, "expert_gate")
    parts = [runner(r, None, rows) for r, rows in zip(routed.chunk(2), x.chunk(2))]
    torch.testing.assert_close(torch.cat(parts), before)


def test_weight_of_a_hoisted_gate_is_kept_where_vllm_packs_it(made: list[Any]) -> None:
    class Packs:
        def process_weights_after_loading(self, layer: Any) -> None:
            layer.packed = layer.weight
            layer.weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)

    x, expert = torch.randn(3, 8), Expert()
    gate = expert.expert_gate
    gate.quant_method = Packs()
    runner = moe_runner.gate_hoisting(Runner)(expert)
    before = runner(x, None, x)
    runner.hoist(expert, "expert_gate")
    runner.decided = True
    compiled_models._watch_loading(runner, gate, None)
    gate.quant_method.process_weights_after_loading(gate)
    assert gate.packed is gate.weight
    assert torch.equal(runner(x, None, x), before)
    other = torch.nn.Linear(8, 8)
    gate.quant_method.process_weights_after_loading(other)
    assert not other.weight.numel(), "vLLM's own linears are packed"


def test_loading_is_followed_for_the_gate_alone(
    made: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the model that it belongs to, and once; a gate that vLLM does not load is no fault."""
    looked_at: list[Any] = []
    monkeypatch.setattr(compiled_models, "_look_at", lambda model, _: looked_at.append(model))
    expert, other = Expert(), torch.nn.Linear(8, 8)
    gate = expert.expert_gate
    runner = moe_runner.gate_hoisting(Runner)(expert)
    model, unrelated = torch.nn.Sequential(runner), torch.nn.Sequential(other)
    monkeypatch.setattr(compiled_models, "_to_be_compiled", [model, unrelated])
    method = types.SimpleNamespace(process_weights_after_loading=lambda layer: None)
    gate.quant_method = other.quant_method = method  # type: ignore[assignment]
    compiled_models._watch_loading(runner, gate, None)
    method.process_weights_after_loading(other)
    assert looked_at == []
    method.process_weights_after_loading(gate)
    assert looked_at == [model]
    runner.decided = True
    method.process_weights_after_loading(gate)
    assert looked_at == [model]
    compiled_models._watch_loading(runner, torch.nn.Linear(8, 1), None)


@pytest.mark.parametrize("problem", [None, "another plugin has replaced the MoE runner"])
def test_registered_with_the_first_runner(
    problem: str | None,
    made: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Not before, when vLLM would refuse another plugin's runner; that one stays, with a line."""
    base = type("MoERunner", (Runner,), {})
    monkeypatch.setattr(moe_runner, "problem_of", lambda runner: problem)
    installed: list[Any] = []
    for module in (compiled_models, fusion_count):
        monkeypatch.setattr(module, "install", functools.partial(installed.append, module))
    for _ in range(2):
        moe_runner._prepare(types.SimpleNamespace(MoERunner=base))  # type: ignore[arg-type]
    assert installed == [compiled_models], "once"
    assert Pluggable.registry == {}
    other = type("Other", (base,), {})
    if problem is not None:
        base.register_oot(other)  # type: ignore[attr-defined]
    runners = [base(Expert()), base(Expert())]
    assert "__new__" not in vars(base)
    assert installed == [compiled_models, fusion_count]
    if problem is None:
        assert {type(r) for r in runners} == {moe_runner.gate_hoisting(base)}
        assert not caplog.messages
    else:
        assert {type(r) for r in runners} == {other}
        assert caplog.messages == [f"gatefuse: gates inside the MoE op are left to vLLM: {problem}"]


def test_a_vllm_whose_compilation_cannot_be_followed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise ImportError("no wrapper")

    monkeypatch.setattr(compiled_models, "install", fail)
    base = type("MoERunner", (Runner,), {})
    moe_runner._prepare(types.SimpleNamespace(MoERunner=base))  # type: ignore[arg-type]
    assert "__new__" not in vars(base)
    assert "cannot be followed: ImportError('no wrapper')" in caplog.text


def test_other_runners_are_wrapped_by_lora_as_before() -> None:
    """vLLM asks whether a runner is an instance of the class registered for MoERunner."""
    registered = moe_runner.gate_hoisting(Runner)
    assert isinstance(type("Derived", (Runner,), {})(), registered)
    assert not isinstance(torch.nn.Linear(1, 1), registered)


def test_vllm_without_a_pluggable_runner_is_left(caplog: pytest.LogCaptureFixture) -> None:
    class MoERunner:
        def __init__(self, shared_experts: Any) -> None: ...

    moe_runner._prepare(types.SimpleNamespace(MoERunner=MoERunner))  # type: ignore[arg-type]
    assert caplog.messages == [
        "gatefuse: vLLM is left as it is: before 0.21 its MoE runner has no replacement"
    ]
    MoERunner(None)


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
    """Tells of a worker with a number of gates in its code, and others that were left, by reason;
    returns the lines."""

    def tell(worker: Worker, seen: int, left: Any = None, expect: int = 0) -> list[str]:
        graph_pass = SimpleNamespace(options=Options(expect=expect))
        monkeypatch.setattr(passes, "pass_of", lambda config: graph_pass if seen else None)
        reasons = [None] * seen + [r for r, n in (left or {}).items() for _ in range(n)]
        config = worker.vllm_config.compilation_config
        fusion_count._gates[id(config)] = {str(i): reason for i, reason in enumerate(reasons)}
        caplog.clear()
        with caplog.at_level("INFO", "vllm.gatefuse"):
            fusion_count._tell(worker)
        return caplog.messages

    yield tell
    fusion_count._counted.clear()
    fusion_count._gates.clear()


def test_line_of_an_engine(tell: Any) -> None:
    """A model and its draft model are one engine; gates that were left are part of the total."""
    assert tell(Worker(fused(3)), 3) == [
        "gatefuse: 3 of 3 shared-expert gates fused (placement inline)"
    ]
    assert tell(Worker(fused(3), fused(1, "kernel")), 4, left={"a": 2}) == [
        "gatefuse: 2 shared-expert gates left to vLLM: a",
        "gatefuse: 4 of 6 shared-expert gates fused (placement 3 inline, 1 kernel)",
    ]
    assert tell(Worker(), 2) == ["gatefuse: 0 of 2 shared-expert gates fused (placement none)"]
    assert tell(Worker(), 0, left={"a": 2}) == ["gatefuse: 2 shared-expert gates left to vLLM: a"]
    assert tell(Worker(), 0) == []
    assert tell(Worker(fused(2)), 0) == [
        "gatefuse: 2 of 2 shared-expert gates fused (placement inline)"
    ]
    assert tell(Worker(fused(3), rank=1), 3) == []


def test_the_last_word_on_a_gate_counts() -> None:
    config = CompilationConfig()
    fusion_count.note_gate(config, "layer", "not compiled")
    fusion_count.note_gate(config, "layer", None)
    assert fusion_count._gates[id(config)] == {"layer": None}
    key = id(config)
    del config
    assert key not in fusion_count._gates


class CompilationConfig:
    """Something that a weak reference can be made to."""


def test_expect_of_an_engine(tell: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tell(Worker(fused(2), fused(1)), 3, expect=3)
    with pytest.raises(FusionError, match="expected at least 4 fused gates in the engine, fused 3"):
        tell(Worker(fused(2), fused(1)), 4, expect=4)
    monkeypatch.setenv("GATEFUSE_EXPECT", "1")
    for left in ({"a": 2}, None):
        with pytest.raises(FusionError, match="fused 0"):
            tell(Worker(), 0, left=left)


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


def test_a_hook_on_an_import(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Called once, when the module is complete; a module that is missing is missing as ever."""
    (tmp_path / "imported_later.py").write_text("value = 1")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    seen: list[Any] = []
    for name in ("imported_later", "not_there_at_all"):
        finder = moe_runner._AfterImport(name, lambda module: seen.append(vars(module)["value"]))
        sys.meta_path.insert(0, finder)
    with pytest.raises(ModuleNotFoundError, match="not_there_at_all"):
        importlib.import_module("not_there_at_all")
    importlib.import_module("imported_later")
    monkeypatch.delitem(sys.modules, "imported_later")
    importlib.import_module("imported_later")
    assert seen == [1]


def test_vllm_in_the_middle_of_its_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, moe_runner.RUNNER_MODULE, types.ModuleType("half"))
    monkeypatch.setattr(sys, "meta_path", [])
    for _ in range(2):
        moe_runner.install()
    assert [type(finder) for finder in sys.meta_path] == [moe_runner._AfterImport]


OP = "Tensor hidden_states, Tensor router_logits, Tensor? shared_experts_input, str layer"


@pytest.mark.parametrize(
    "runner, op, problem",
    [
        (Runner, f"{OP}) -> (Tensor, Tensor)", None),
        (Pluggable, f"{OP}) -> (Tensor, Tensor)", "does not take the shared expert"),
        (
            type("", (Pluggable,), {"__init__": lambda self, shared_experts: None}),
            f"{OP}) -> (Tensor, Tensor)",
            "does not choose how the MoE op is called",
        ),
        (Runner, f"Tensor x, {OP}) -> (Tensor, Tensor)", "something else than is known"),
        (Runner, f"{OP}) -> Tensor", "something else than is known"),
    ],
)
def test_runners_that_look_different(
    monkeypatch: pytest.MonkeyPatch, runner: Any, op: str, problem: str | None
) -> None:
    schema = torch._C.parse_schema(f"vllm::moe_forward_shared({op}")
    op_of = SimpleNamespace(moe_forward_shared=SimpleNamespace(default=SimpleNamespace()))
    op_of.moe_forward_shared.default._schema = schema
    monkeypatch.setattr(torch.ops, "vllm", op_of, raising=False)
    custom_op = types.ModuleType("custom_op")
    custom_op.op_registry_oot = {}  # type: ignore[attr-defined]
    parent = types.ModuleType("vllm.model_executor")
    parent.custom_op = custom_op  # type: ignore[attr-defined]
    for name, module in (("vllm", types.ModuleType("vllm")), ("vllm.model_executor", parent)):
        monkeypatch.setitem(sys.modules, name, module)
    found = moe_runner.problem_of(runner)
    assert found is None if problem is None else problem in str(found)


def test_a_runner_that_cannot_be_registered(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever raises, vLLM goes on, with a line."""
    monkeypatch.setattr(fusion_count, "install", lambda: None)
    monkeypatch.setattr(moe_runner, "problem_of", lambda runner: 1 / 0)
    moe_runner._register(type("MoERunner", (Runner,), {}))
    assert caplog.messages == [
        "gatefuse: gates inside the MoE op are left to vLLM: "
        "its MoE runner cannot be replaced: ZeroDivisionError: division by zero"
    ]


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
