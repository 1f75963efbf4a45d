"""Takes the shared expert's gate out of vLLM's opaque MoE op, into the traced part of the layer.

The gate is the last step of the shared expert and scales rows, so it commutes with the sum over
tensor-parallel ranks. vLLM's ``MoERunner.forward`` calls ``self._forward_entry``, an opaque op that
returns ``(shared, fused)``, and adds the two: a gate applied to ``shared`` between the call and the
sum is computed on the same operands and is visible to graph passes. What surrounds the op, and the
stream that overlaps the shared expert with the routed ones, stays as it is.

Everything is probed by feature. Where something looks different the layer is left to vLLM, with
the reason in one log line for each reason.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import inspect
import logging
import re
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F

from gatefuse import settings
from gatefuse.integrations.vllm import fusion_count, passes

__all__ = ["install"]

log = logging.getLogger("vllm.gatefuse")

RUNNER_MODULE = "vllm.model_executor.layers.fused_moe.runner.moe_runner"

_logged: set[str] = set()


def install() -> None:
    """Patch vLLM's MoE runner, now or as soon as vLLM imports it; idempotent."""
    module = sys.modules.get(RUNNER_MODULE)
    if module is not None and hasattr(module, "MoERunner"):
        _patch(module)
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport(RUNNER_MODULE, _patch))


class _AfterImport(MetaPathFinder):
    """Calls a function with a module when it has been imported, and then is gone."""

    def __init__(self, name: str, hook: Callable[[ModuleType], None]) -> None:
        self.name = name
        self.hook = hook

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self.hook(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _patch(module: ModuleType) -> None:
    try:
        runner = module.MoERunner
        problem = _runner_problem(runner)
    except Exception as e:
        problem = f"its MoE runner cannot be read: {type(e).__name__}: {e}"
    if problem is not None:
        log.warning("gatefuse: vLLM is left as it is: %s", problem)
        return
    init = runner.__init__
    if getattr(init, "gatefuse", False):
        return
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        arguments = signature.bind(self, *args, **kwargs).arguments
        expert = arguments.get("shared_experts")
        held = arguments.get("shared_expert_gate") is not None
        if held or getattr(expert, "expert_gate", None) is not None:
            _gate_found(self, runner, expert, held)

    wrapper.gatefuse = True  # type: ignore[attr-defined]
    runner.__init__ = wrapper


def _runner_problem(runner: Any) -> str | None:
    """Why the class is not one that is known to call the MoE op and to add its two results."""
    if "shared_experts" not in inspect.signature(runner.__init__).parameters:
        return "its MoE runner does not take the shared expert"
    init = inspect.getsource(runner.__init__)
    forward = inspect.getsource(runner.forward)
    call = r"self\._forward_entry\(\s*hidden_states,\s*router_logits,\s*shared_experts_input,"
    if "self._forward_entry = " not in init or len(re.findall(call, forward)) != 1:
        return "its MoE runner does not call the MoE op through _forward_entry"
    if not re.search(r"_unpack\(\s*result\s*\)|shared_output, fused_output = ", forward):
        return "its MoE runner does not add the shared expert to the routed ones"
    return None


def _expert_problem(expert: Any) -> str | None:
    """Why the class is not one whose last step is the gate."""
    try:
        source = "".join(inspect.getsource(expert.forward).split())
    except (OSError, TypeError) as e:
        return f"the source of {expert.__name__}.forward cannot be read: {e}"
    last = "ifself.expert_gateisnotNone:out=F.sigmoid(self.expert_gate(x)[0])*outreturnout"
    if not source.endswith(last) or source.count("expert_gate") != 2:
        return f"{expert.__name__} does not end with the gate"
    return None


def _layer_problem(runner: Any, known: Any, expert: Any, held: bool) -> str | None:
    """Why the gate of this layer stays where it is."""
    from vllm import envs
    from vllm.config import get_current_vllm_config

    if held:
        return "the gate is fused with the router's (shared_expert_gate is held by the runner)"
    if type(runner) is not known:
        return f"{type(runner).__name__} may call the MoE op in ways of its own"
    if (problem := _expert_problem(type(expert))) is not None:
        return problem
    gate = expert.expert_gate
    weight = getattr(gate, "weight", None)
    if not isinstance(weight, torch.Tensor) or tuple(weight.shape[:-1]) != (1,):
        return "the gate's weight is not one row"
    if weight.dtype not in (torch.float16, torch.bfloat16, torch.float32) or (
        getattr(gate, "quant_config", None) is not None
    ):
        return "the gate is quantised"
    if getattr(gate, "bias", None) is not None:
        return "the gate has a bias"
    if getattr(runner.moe_config, "is_sequence_parallel", False):
        return "the MoE layer is sequence parallel"
    if get_current_vllm_config().lora_config is not None:
        return "LoRA is enabled, whose streams rely on the MoE op"
    if getattr(envs, "VLLM_BATCH_INVARIANT", False):
        return "batch invariance is asked for, which vLLM's own linears ensure"
    return None


def _compiles(compilation_config: Any) -> bool:
    """Whether the engine compiles with Inductor in a mode that takes its Inductor config."""
    mode = getattr(compilation_config.mode, "name", "")
    if mode not in ("DYNAMO_TRACE_ONCE", "VLLM_COMPILE"):
        return False
    return compilation_config.backend == "inductor"


def _gate_found(runner: Any, known: Any, expert: Any, held: bool) -> None:
    from vllm.config import get_current_vllm_config

    if settings.disabled_by_environment():
        return
    compilation_config = get_current_vllm_config().compilation_config
    if not _compiles(compilation_config):
        return
    try:
        problem = _layer_problem(runner, known, expert, held)
    except Exception as e:  # internals of a version that looks different
        problem = f"the layer cannot be read: {type(e).__name__}: {e}"
    fusion_count.install()
    if problem is not None:
        if problem not in _logged:
            _logged.add(problem)
            log.info("gatefuse: shared-expert gates are left to vLLM: %s", problem)
        fusion_count.note_left_alone(compilation_config)
        return
    graph_pass = passes.add_pass(compilation_config)
    _hoist(runner, expert)
    graph_pass.hoisted.append(runner.layer_name)


def _hoist(runner: Any, expert: Any) -> None:
    gate, entry = expert.expert_gate, runner._forward_entry
    expert.expert_gate = None  # the model's block still holds the gate, for weights and the like
    _keep_weight(gate)

    def gated(
        hidden_states: Any, router_logits: Any, shared_experts_input: Any, *rest: Any
    ) -> tuple[Any, Any]:
        shared, fused = entry(hidden_states, router_logits, shared_experts_input, *rest)
        # hidden_states may be padded or projected for the routed experts.
        x = hidden_states if shared_experts_input is None else shared_experts_input
        # Not gate(x): vLLM's linears are opaque ops of their own on the CPU and on ROCm.
        return torch.sigmoid(F.linear(x, gate.weight)) * shared, fused

    runner._forward_entry = gated


def _keep_weight(gate: Any) -> None:
    """Keep the gate's weight as it was loaded: vLLM on the CPU packs it for its own linear."""
    method: Any = getattr(gate, "quant_method", None)
    process = getattr(method, "process_weights_after_loading", None)
    if process is None:
        return

    def process_weights_after_loading(layer: torch.nn.Module) -> None:
        weight = layer.weight
        process(layer)
        if layer is gate:
            layer.weight = weight

    method.process_weights_after_loading = process_weights_after_loading
