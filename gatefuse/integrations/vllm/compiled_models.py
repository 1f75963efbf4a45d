"""Which gates of a model are in compiled code, or can be taken there.

Asked when vLLM has decided to compile: it initialises a ``TorchCompileWithNoGuardsWrapper`` in each
module that it is going to compile. The engine's mode does not tell, for many models are compiled in
no mode, and a gate hoisted from one of them would run by itself beside the MoE op. So nothing is
hoisted elsewhere.

In such a module each shared expert inside the MoE op is freed of its gate, if nothing speaks
against it. The gates of shared experts outside the op are traced, and only the pass is missing.
"""

from __future__ import annotations

import functools
import logging
import re
import weakref
from typing import Any

import torch
from torch import nn

from gatefuse import settings
from gatefuse.compat import TESTED_VLLM
from gatefuse.integrations.vllm import fusion_count, passes
from gatefuse.integrations.vllm.shared_expert import gate_names, problem_of

__all__ = ["install", "runner_made"]

log = logging.getLogger("vllm.gatefuse")

_to_be_compiled: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def install() -> None:
    """Follow vLLM's decisions to compile from now on; idempotent."""
    from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper

    plain = TorchCompileWithNoGuardsWrapper.__init__
    if hasattr(plain, "gatefuse"):
        return

    @functools.wraps(plain)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(self, nn.Module) and not settings.disabled_by_environment():
            _to_be_compiled.add(self)
            _look_at(self, _current())
        plain(self, *args, **kwargs)

    wrapper.gatefuse = True  # type: ignore[attr-defined]
    TorchCompileWithNoGuardsWrapper.__init__ = wrapper


def runner_made(runner: Any, expert: Any, gate_beside: Any) -> None:
    """A runner of gatefuse's is built. expert: what it takes as shared expert; gate_beside: a gate
    that it holds next to the router's (ROCm's AITER computes both in one product)."""
    try:
        _note_runner(runner, expert, gate_beside)
    except Exception as e:  # vLLM goes on, whatever it is
        log.warning("gatefuse: a MoE layer is left to vLLM: %r", e)


def _note_runner(runner: Any, expert: Any, gate_beside: Any) -> None:
    vllm_config = _current()
    config = vllm_config.compilation_config
    names = list(gate_names(expert)) if isinstance(expert, nn.Module) else []
    if names:
        _say_if_newer_than_tested()
        runner.__dict__["gated"] = (expert, names[0])  # not as a submodule
        _watch_loading(runner, expert.get_submodule(names[0]), vllm_config)
        fusion_count.note_gate(config, runner.layer_name, _not_compiled(config))
    elif gate_beside is not None and _has_fused_experts(runner):
        reason = "the gate is fused with the router's, inside the MoE op"
        fusion_count.note_gate(config, runner.layer_name, reason)


def _watch_loading(runner: Any, gate: Any, vllm_config: Any) -> None:
    """Follow what vLLM does with a gate after its weight is loaded.

    By then a model is complete that got its runners after vLLM had decided to compile it, as one of
    transformers does. And vLLM on the CPU packs the weights of its linears: of a hoisted gate the
    one that was loaded, a single row, is kept.
    """
    method: Any = getattr(gate, "quant_method", None)
    process = getattr(method, "process_weights_after_loading", None)
    if process is None:
        return

    def process_weights_after_loading(layer: nn.Module) -> None:
        if layer is gate and not vars(runner).get("decided"):
            for model in list(_to_be_compiled):
                if any(module is runner for module in model.modules()):
                    _look_at(model, vllm_config)
        weight = layer.weight
        process(layer)
        if layer is runner.hoisted_gate:
            layer.weight = weight

    method.process_weights_after_loading = process_weights_after_loading


@functools.cache
def _say_if_newer_than_tested() -> None:
    import vllm

    this, newest = (
        [int(number) for number in re.findall(r"\d+", version)[:2]]
        for version in (vllm.__version__, TESTED_VLLM[-1])
    )
    if this > newest:
        log.info("gatefuse: not tested with this vLLM, %s", vllm.__version__)


def _current() -> Any:
    from vllm.config import get_current_vllm_config

    return get_current_vllm_config()


def _has_fused_experts(runner: Any) -> bool:
    """Whether the shared expert is computed as one of the routed ones."""
    manager = getattr(runner, "expert_map_manager", None)
    return getattr(manager, "num_fused_shared_experts", 1) > 0


def _not_compiled(config: Any) -> str:
    """Why vLLM compiles no model, as long as it has not said that it does."""
    from vllm import envs

    mode = getattr(config.mode, "name", config.mode)
    if mode in ("DYNAMO_TRACE_ONCE", "VLLM_COMPILE"):
        return "vLLM does not compile this model"
    breakable = getattr(envs, "VLLM_USE_BREAKABLE_CUDAGRAPH", False)
    return f"compilation mode {mode}" + ", with breakable CUDA graphs" * bool(breakable)


def _look_at(model: nn.Module, vllm_config: Any) -> None:
    try:
        _take_gates(model, vllm_config)
    except Exception as e:  # vLLM goes on, whatever it is
        log.warning("gatefuse: %s is left to vLLM: %r", type(model).__name__, e)
        for module in model.modules():
            if "gated" in vars(module) and getattr(module, "hoisted_gate", None) is None:
                reason = f"the model cannot be read: {type(e).__name__}: {e}"
                fusion_count.note_gate(
                    vllm_config.compilation_config, str(module.layer_name), reason
                )


def _take_gates(model: nn.Module, vllm_config: Any) -> None:
    """Hoist what can be, of a module that will be compiled, and add the pass if it has a gate."""
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    config = vllm_config.compilation_config
    engine_problem = _engine_problem(config)
    inside: dict[int, Any] = {}  # the runner that a module belongs to
    known: set[int] = set()
    for runner in [m for m in model.modules() if isinstance(m, MoERunner)]:
        inside |= {id(m): runner for m in runner.modules()}
        expert, name = vars(runner).get("gated", (None, ""))
        if expert is None:
            continue
        known.add(id(getattr(expert, name)))
        if vars(runner).get("decided"):
            continue
        runner.__dict__["decided"] = True
        try:
            problem = engine_problem or _problem(model, expert, name, vllm_config.lora_config)
            if problem is None:
                runner.hoist(expert, name)
                passes.add_pass(config).hoisted.append(runner.layer_name)
        except Exception as e:  # internals of a version that looks different
            problem = f"the layer cannot be read: {type(e).__name__}: {e}"
        fusion_count.note_gate(config, runner.layer_name, problem)
    for path, module in model.named_modules():
        for name in gate_names(module):
            if id(gate := getattr(module, name)) in known:
                continue
            problem = engine_problem
            if name == "expert_gate" and problem_of(module, name) is None:
                if (runner := inside.get(id(module))) is not None:
                    problem = f"{type(runner).__name__} may call the MoE op in ways of its own"
                fusion_count.note_gate(config, f"{type(model).__name__}.{path}", problem)
            elif name != "shared_expert_gate" or not isinstance(gate, nn.Linear):
                continue  # else it is of a block of transformers, and counted if it is fused
            if problem is None:
                passes.add_pass(config)


def _engine_problem(config: Any) -> str | None:
    """Why an engine that compiles gets no pass."""
    from vllm import envs

    if config.backend != "inductor":
        return f"the backend {config.backend} is not Inductor"
    if getattr(envs, "VLLM_BATCH_INVARIANT", False):
        return "batch invariance is asked for, which vLLM's own linears ensure"
    return None


def _problem(model: nn.Module, expert: nn.Module, name: str, lora_config: Any) -> str | None:
    """Why the gate of a shared expert stays inside the MoE op."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    if (problem := problem_of(expert, name)) is not None:
        return problem
    gate: Any = expert.get_submodule(name)
    method = getattr(gate, "quant_method", None)
    floats = (torch.float16, torch.bfloat16, torch.float32)
    if gate.weight.dtype not in floats or not isinstance(
        method, (UnquantizedLinearMethod, type(None))
    ):
        return "the gate is quantised"
    if getattr(gate, "bias", None) is not None:
        return "the gate has a bias"
    if lora_config is not None:
        targets = {target.rpartition(".")[2] for target in lora_config.target_modules or ()}
        paths = model.named_modules(remove_duplicate=False)
        names = {path.rpartition(".")[2] for path, module in paths if module is gate}
        if not targets or targets & names:
            return "LoRA may adapt the gate, for its target_modules do not leave it out"
    return None
