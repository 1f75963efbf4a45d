"""What becomes of the gates of models as vLLM builds them, on every path but those of engines.

The models are built by vLLM and not run, which takes less than a second each; test_engines.py runs
some of them.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gatefuse.integrations.vllm import compiled_models, fusion_count, moe_runner, passes
from tests.test_vllm import Expert, Linear
from tests.vllm_cpu import cuda_path

pytest.importorskip("vllm")

Build = Callable[..., SimpleNamespace]
FUSED = [None, None]


@pytest.fixture(scope="module")
def vllm() -> Iterator[None]:
    """vLLM with the plugin, and without what makes the CPU different, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("VLLM_NO_USAGE_STATS", "1")
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("VLLM_PLUGINS", "")
        moe_runner.install()
        cuda_path.apply()
        yield


@pytest.fixture
def build(vllm: None, place: Path) -> Build:
    """Builds a model of tiny.py, or of a folder, and loads no weights; keywords as vLLM's LLM takes
    them. ``left``: for each gate why it is left to vLLM, or None; ``hoisted``: names of layers."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import (
        initialize_model,
        process_weights_after_loading,
    )
    from vllm.utils.torch_utils import set_default_torch_dtype

    def build(model: str | Path, edit: Any = None, **arguments: Any) -> SimpleNamespace:
        arguments = {"compilation_config": {"mode": 3}, "max_model_len": 128} | arguments
        folder = place / "models" / model
        config = EngineArgs(
            model=str(folder), skip_tokenizer_init=True, dtype="bfloat16", **arguments
        ).create_engine_config()
        if edit is not None:
            edit(config)
        with set_current_vllm_config(config):
            if not torch.distributed.is_initialized():
                store = f"file://{place}/store"
                parallel_state.init_distributed_environment(1, 0, store, 0, "gloo")
                parallel_state.ensure_model_parallel_initialized(1, 1)
            with set_default_torch_dtype(torch.bfloat16):
                module = initialize_model(vllm_config=config)
            process_weights_after_loading(module, config.model_config, torch.device("cpu"))
        compilation = config.compilation_config
        graph_pass = passes.pass_of(compilation)
        return SimpleNamespace(
            model=module,
            config=config,
            left=list(fusion_count._gates.get(id(compilation), {}).values()),
            hoisted=[] if graph_pass is None else graph_pass.hoisted,
            graph_pass=graph_pass,
        )

    return build


@pytest.fixture
def said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Iterator[pytest.LogCaptureFixture]:
    """What gatefuse logs, by a logger that vLLM does not set up anew while it builds a model."""
    for module in (compiled_models, moe_runner):
        monkeypatch.setattr(module, "log", logging.getLogger("gatefuse said"))
    with caplog.at_level("INFO"):
        yield caplog


LAYERS = [f"model.layers.{i}.mlp.experts" for i in range(4)]
FAMILIES = {"qwen2_moe": 2, "qwen3_moe": 2, "qwen3_next": 4}


@pytest.mark.parametrize("model", list(FAMILIES))
def test_hoisted(build: Build, model: str) -> None:
    built = build(model)
    assert built.left == [None] * FAMILIES[model]
    assert built.hoisted == LAYERS[: FAMILIES[model]]
    names = [name for name, _ in built.model.named_parameters() if "expert_gate" in name]
    assert names == [
        f"model.layers.{i}.mlp.shared_expert_gate.weight" for i in range(FAMILIES[model])
    ]


def test_transformers_backend(build: Build) -> None:
    """vLLM decides on transformers' model before it puts the runners in."""
    built = build("qwen2_moe", model_impl="transformers")
    assert "Transformers" in type(built.model).__name__
    assert (built.left, built.hoisted) == (FUSED, LAYERS[:2])


def test_draft_of_the_same_checkpoint(build: Build) -> None:
    """The layer of multi-token prediction, which is a model of its own and part of the engine."""
    from vllm.config import replace
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    speculative = {"method": "mtp", "num_speculative_tokens": 1}
    built = build("qwen3_next", speculative_config=speculative)
    config = replace(built.config, load_config=built.config.load_config)  # as vLLM's runners do
    with set_default_torch_dtype(torch.bfloat16):
        draft = initialize_model(
            vllm_config=config, model_config=config.speculative_config.draft_model_config
        )
    assert type(draft).__name__ == "Qwen3NextMTP"
    assert len(built.hoisted) == 5
    assert fusion_count._gates[id(built.config.compilation_config)] == dict.fromkeys(built.hoisted)


def stays(built: SimpleNamespace, reason: str) -> bool:
    """Every gate is left, for this reason, and where vLLM has put it; there is no pass."""
    gates = [m.expert_gate for m in built.model.modules() if hasattr(m, "expert_gate")]
    assert built.graph_pass is None
    assert len(gates) == len(built.left) == 2
    assert None not in gates
    return all(reason in str(one) for one in built.left)


def test_engines_that_are_not_compiled(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    none = {"mode": 0}
    assert stays(build("qwen2_moe", enforce_eager=True, compilation_config={}), "mode NONE")
    assert stays(build("qwen2_moe", compilation_config=none), "compilation mode NONE")
    stock = {"mode": 1}
    assert stays(build("qwen2_moe", compilation_config=stock), "mode STOCK_TORCH_COMPILE")
    eager = {"mode": 3, "backend": "eager"}

    def with_backend(config: Any) -> None:
        config.compilation_config.backend = "eager"

    assert stays(build("qwen2_moe", with_backend, compilation_config=eager), "backend eager")
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")
    built = build("qwen2_moe")
    assert stays(built, "compilation mode NONE, with breakable CUDA graphs")


def test_models_that_are_not_compiled(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an engine that compiles: the decorator is missing, or says that it does not apply."""
    from vllm.compilation import decorators
    from vllm.model_executor.models.qwen2_moe import Qwen2MoeModel

    monkeypatch.setattr(Qwen2MoeModel, decorators.IGNORE_COMPILE_KEY, True)
    built = build("qwen2_moe")
    assert built.config.compilation_config.mode.name == "VLLM_COMPILE"
    assert stays(built, "vLLM does not compile this model")


def test_vllm_is_followed_once_and_in_modules_alone(build: Build) -> None:
    from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper

    build("qwen2_moe")
    followed = TorchCompileWithNoGuardsWrapper.__init__
    compiled_models.install()
    assert TorchCompileWithNoGuardsWrapper.__init__ is followed

    class NoModule(TorchCompileWithNoGuardsWrapper):
        def forward(self) -> None: ...

    made = object.__new__(NoModule)
    with contextlib.suppress(Exception):  # vLLM wants the configuration of an engine
        made.__init__()  # type: ignore[misc]
    assert not any(model is made for model in compiled_models._to_be_compiled)


def test_turned_off_after_the_plugin_was_loaded(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GATEFUSE_DISABLE", "1")
    built = build("qwen2_moe")
    assert (built.graph_pass, built.hoisted) == (None, [])
    gates = [m.expert_gate for m in built.model.modules() if hasattr(m, "expert_gate")]
    assert len(gates) == 2
    assert None not in gates


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ("_note_runner", "GateHoistingRunner may call the MoE op in ways of its own"),
        ("_take_gates", "the model cannot be read: ValueError: broken"),
        ("_problem", "the layer cannot be read: ValueError: broken"),
    ],
)
def test_errors_leave_the_model_to_vllm(
    build: Build,
    monkeypatch: pytest.MonkeyPatch,
    said: pytest.LogCaptureFixture,
    broken: str,
    reason: str,
) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("broken")

    monkeypatch.setattr(compiled_models, broken, fail)
    built = build("qwen2_moe")
    assert stays(built, reason)
    # A layer that cannot be read is in the engine's one line, with the others that are left.
    assert ("left to vLLM: ValueError('broken')" in said.text) == (broken != "_problem")


def test_batch_invariance(monkeypatch: pytest.MonkeyPatch) -> None:
    """No backend of the CPU's has it, so no model is built."""
    from vllm import envs

    config = SimpleNamespace(backend="inductor")
    assert compiled_models._engine_problem(config) is None
    monkeypatch.setattr(envs, "VLLM_BATCH_INVARIANT", True, raising=False)
    assert "batch invariance" in str(compiled_models._engine_problem(config))


@pytest.mark.parametrize(
    "targets, hoisted",
    [
        (None, False),
        (["q_proj", "shared_expert_gate"], False),
        (["model.layers.0.mlp.shared_expert_gate"], False),
        (["expert_gate"], False),  # the same gate, as the shared expert calls it
        (["q_proj", "o_proj"], True),
    ],
)
def test_lora(build: Build, targets: Any, hoisted: bool) -> None:
    """The gate is hoisted where no adapter can touch it."""
    built = build("qwen2_moe", enable_lora=True, lora_target_modules=targets)
    assert built.config.lora_config is not None
    if hoisted:
        assert (built.left, built.hoisted) == (FUSED, LAYERS[:2])
    else:
        assert stays(built, "LoRA may adapt the gate")


def edited_gate(monkeypatch: pytest.MonkeyPatch, edit: Callable[[Any], None]) -> None:
    """Every gate that Qwen2-MoE makes from now on is edited."""
    from vllm.model_executor.models import qwen2_moe

    class Edited(qwen2_moe.ReplicatedLinear):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            edit(self)

    monkeypatch.setattr(qwen2_moe, "ReplicatedLinear", Edited)


def test_quantised_gates(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked of how the gate's weight is kept, not of what the linear was given: one that stands on
    a checkpoint's list of exceptions has a quantisation config all the same."""

    def exempt(gate: Any) -> None:
        gate.quant_config = object()

    def quantise(gate: Any) -> None:
        gate.quant_method = SimpleNamespace()

    def pack(gate: Any) -> None:
        gate.weight = torch.nn.Parameter(gate.weight.to(torch.int8), requires_grad=False)

    with monkeypatch.context() as patch:
        edited_gate(patch, exempt)
        assert build("qwen2_moe").left == FUSED
    for edit in (quantise, pack):
        with monkeypatch.context() as patch:
            edited_gate(patch, edit)
            assert stays(build("qwen2_moe"), "quantised")


def test_a_gate_with_a_bias(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    def add_bias(gate: Any) -> None:
        gate.bias = torch.nn.Parameter(torch.zeros(1), requires_grad=False)

    edited_gate(monkeypatch, add_bias)
    assert stays(build("qwen2_moe"), "has a bias")


def test_a_shared_expert_that_does_more(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.models.qwen2_moe import Qwen2MoeMLP

    plain = Qwen2MoeMLP.forward
    monkeypatch.setattr(Qwen2MoeMLP, "forward", lambda self, x: 2 * plain(self, x))
    assert stays(build("qwen2_moe"), "Qwen2MoeMLP does not end with the gate")


def test_shared_experts_outside_the_op(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replicated ones, as of Quark's OCP MX checkpoints with tensor parallelism: vLLM traces them,
    and only the pass is missing."""
    from vllm.model_executor.models import qwen3_next

    replicates = "_should_replicate_misaligned_shared_expert"
    if not hasattr(qwen3_next, replicates):
        pytest.skip("this vLLM replicates none")
    monkeypatch.setattr(qwen3_next, replicates, lambda *args, **kwargs: True)
    built = build("qwen3_next")
    assert built.left == [None] * 4
    assert built.graph_pass is not None and not built.hoisted
    experts = [m for m in built.model.modules() if isinstance(m, qwen3_next.Qwen3NextMLP)]
    assert all(expert.expert_gate is not None for expert in experts)


def test_which_modules_have_a_gate(build: Build) -> None:
    """A traced gate counts under the name that shared experts have for it. One of a block of
    transformers is a plain linear: the pass is added, and what it fuses counts."""

    def take(model: torch.nn.Module) -> tuple[list[str | None], bool]:
        config = copy.copy(built.config.compilation_config)
        config.inductor_compile_config = {}
        compiled_models._take_gates(model, SimpleNamespace(compilation_config=config))
        left = list(fusion_count._gates.get(id(config), {}).values())
        return left, passes.pass_of(config) is not None

    class OtherName(Expert):
        def __init__(self) -> None:
            super().__init__()
            self.row_gate, self.expert_gate = self.expert_gate, None

        def forward(self, x: Any) -> Any:
            out, _ = self.down_proj(x)
            return out if self.row_gate is None else self.row_gate(x)[0].sigmoid() * out

    def block(gate: torch.nn.Module) -> torch.nn.Module:
        made = torch.nn.Module()
        made.shared_expert_gate = gate
        return made

    built = build("qwen2_moe")
    gate = torch.nn.Linear(8, 1, bias=False)
    assert take(torch.nn.Sequential(Expert())) == ([None], True)
    assert take(torch.nn.Sequential(Expert(gate), Expert(gate))) == ([None] * 2, True)
    assert take(torch.nn.Sequential(OtherName())) == ([], False)
    assert take(block(Linear())) == ([], False)
    assert take(block(gate)) == ([], True)
    assert take(torch.nn.Sequential(gate)) == ([], False)


def test_gates_that_vllm_fuses_with_the_routers(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ROCm's AITER computes the shared expert as a routed one. A model without a shared expert may
    hold a gate all the same, which is none."""
    from vllm.model_executor.models import qwen3_next

    with monkeypatch.context() as patch:
        patch.setattr(compiled_models, "_has_fused_experts", lambda runner: True)
        patch.setattr(qwen3_next, "Qwen3NextMLP", lambda *args, **kwargs: None)
        fused = build("qwen3_next", no_shared_expert)
        # A runner without a gate beside the router's has none that could be fused with it.
        assert build("qwen2_moe", no_shared_expert).left == []
    assert all("fused with the router's" in str(reason) for reason in fused.left)
    assert len(fused.left) == 4
    without = build("qwen3_next", no_shared_expert)
    assert without.left == []


def no_shared_expert(config: Any) -> None:
    config.model_config.hf_text_config.shared_expert_intermediate_size = 0


def test_the_runner_of_another_plugin(
    build: Build, monkeypatch: pytest.MonkeyPatch, said: pytest.LogCaptureFixture
) -> None:
    """It can be registered, also after vLLM's module was imported, and stays; one line says so."""
    from vllm.model_executor import custom_op
    from vllm.model_executor.layers.fused_moe.runner import moe_runner as vllms

    ours = custom_op.op_registry_oot.pop("MoERunner", None)
    moe_runner._prepare(vllms)
    other = vllms.MoERunner.register_oot(type("OtherRunner", (vllms.MoERunner,), {}))
    try:
        built = build("qwen2_moe")
        kinds = {type(m) for m in built.model.modules() if isinstance(m, vllms.MoERunner)}
        assert kinds == {other}
        assert stays(built, "OtherRunner may call the MoE op in ways of its own")
        assert "another plugin has replaced the MoE runner by" in said.text
    finally:
        del custom_op.op_registry_oot["MoERunner"]
        if ours is not None:
            custom_op.op_registry_oot["MoERunner"] = ours


def test_other_models_keep_their_graph(build: Build, tmp_path: Path) -> None:
    """A model without such a gate gets no pass and no line."""
    built = build("qwen2_moe", no_shared_expert)
    assert (built.left, built.graph_pass) == ([], None)


def test_a_newer_vllm(
    build: Build, monkeypatch: pytest.MonkeyPatch, said: pytest.LogCaptureFixture
) -> None:
    for version in (compiled_models.TESTED_VLLM[-1], "0.99.1"):
        monkeypatch.setattr("vllm.__version__", version)
        compiled_models._say_if_newer_than_tested.cache_clear()
        assert build("qwen2_moe").left == FUSED
    assert said.text.count("not tested with this vLLM") == 1
    assert "not tested with this vLLM, 0.99.1" in said.text
