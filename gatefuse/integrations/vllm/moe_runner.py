"""vLLM's MoE runner with the shared expert's gate outside the opaque MoE op.

The gate is the last step of the shared expert and scales rows, so it commutes with the sum over
tensor-parallel ranks. ``MoERunner.forward`` calls ``self._forward_entry``, an opaque op that
returns ``(shared, fused)``, and adds the two: a gate applied to ``shared`` between the call and the
sum is computed on the same operands and is visible to graph passes. What surrounds the op, and the
stream that overlaps the shared expert with the routed ones, stays as it is.

The runner is registered with vLLM's own means of replacing a layer. It differs from vLLM's only
once ``hoist`` is called, which :mod:`gatefuse.integrations.vllm.compiled_models` does.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import inspect
import logging
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F

from gatefuse.integrations.vllm import compiled_models, fusion_count

__all__ = ["RUNNER_MODULE", "install"]

log = logging.getLogger("vllm.gatefuse")

RUNNER_MODULE = "vllm.model_executor.layers.fused_moe.runner.moe_runner"


def install() -> None:
    """Prepare vLLM's MoE runner, now or as soon as vLLM imports it; idempotent."""
    module = sys.modules.get(RUNNER_MODULE)
    if module is not None and hasattr(module, "MoERunner"):
        _prepare(module)
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport(RUNNER_MODULE, _prepare))


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


def _prepare(module: ModuleType) -> None:
    """Register the runner when the first one is made: until then vLLM would refuse to register
    another plugin's beside it."""
    runner = module.MoERunner
    if not hasattr(runner, "register_oot"):
        log.warning(
            "gatefuse: vLLM is left as it is: before 0.21 its MoE runner has no replacement"
        )
        return

    def first(cls: Any, *args: Any, **kwargs: Any) -> Any:
        del runner.__new__
        _register(runner)
        return runner.__new__(cls, *args, **kwargs)

    if "__new__" in vars(runner):
        return
    try:
        compiled_models.install()  # vLLM may decide on a model before it has a runner
    except Exception as e:
        log.warning("gatefuse: vLLM is left as it is: what it compiles cannot be followed: %r", e)
        return
    runner.__new__ = first


def _register(runner: Any) -> None:
    fusion_count.install()
    try:
        problem = problem_of(runner)
        if problem is None:
            runner.register_oot(gate_hoisting(runner))
    except Exception as e:
        problem = f"its MoE runner cannot be replaced: {type(e).__name__}: {e}"
    if problem is not None:
        log.warning("gatefuse: gates inside the MoE op are left to vLLM: %s", problem)


def problem_of(runner: Any) -> str | None:
    """Why vLLM's class of MoE runners is not replaced."""
    from vllm.model_executor import custom_op

    if (other := custom_op.op_registry_oot.get(runner.__name__)) is not None:
        return f"another plugin has replaced the MoE runner by {other.__module__}.{other.__name__}"
    if "shared_experts" not in inspect.signature(runner.__init__).parameters:
        return "its MoE runner does not take the shared expert"
    if not hasattr(runner, "_select_forward"):
        return "its MoE runner does not choose how the MoE op is called"
    schema = torch.ops.vllm.moe_forward_shared.default._schema
    inputs = [argument.name for argument in schema.arguments[:3]]
    if inputs != ["hidden_states", "router_logits", "shared_experts_input"] or (
        [str(value.type) for value in schema.returns] != ["Tensor", "Tensor"]
    ):
        return "its MoE op takes or returns something else than is known"
    return None


@functools.cache
def gate_hoisting(runner: Any) -> Any:
    """The runner to be registered in place of vLLM's, which is given."""
    signature = inspect.signature(runner.__init__)

    class GateHoistingRunner(runner):
        """vLLM's MoE runner, whose shared expert's gate can be taken out of the MoE op."""

        hoisted_gate: Any = None

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            arguments = signature.bind(self, *args, **kwargs).arguments
            compiled_models.runner_made(
                self, arguments.get("shared_experts"), arguments.get("shared_expert_gate")
            )

        @classmethod
        def __subclasshook__(cls, other: Any) -> Any:
            # vLLM's LoRA takes any runner for an instance of the registered class, or for none.
            return True if runner in other.__mro__ else NotImplemented

        def _select_forward(self) -> Any:
            entry, gate = super()._select_forward(), self.hoisted_gate
            if gate is None:
                return entry

            def gated(
                hidden_states: Any, router_logits: Any, shared_experts_input: Any, *rest: Any
            ) -> tuple[Any, Any]:
                shared, fused = entry(hidden_states, router_logits, shared_experts_input, *rest)
                # hidden_states may be padded or projected for the routed experts.
                x = hidden_states if shared_experts_input is None else shared_experts_input
                # Not gate(x): vLLM's linears are opaque ops of their own on the CPU and on ROCm.
                return torch.sigmoid(F.linear(x, gate.weight)) * shared, fused

            return gated

        def hoist(self, expert: torch.nn.Module, name: str) -> None:
            """Apply the expert's gate, its submodule ``name``, to what the MoE op returns.

            Raises RuntimeError, with nothing changed, if the op is called in some other way.
            """
            if vars(self).get("_forward_entry") != super()._select_forward():
                raise RuntimeError("the runner calls the MoE op in another way")
            gate = expert.get_submodule(name)
            setattr(expert, name, None)  # the model's block still holds it and loads its weight
            self.__dict__["hoisted_gate"] = gate  # no submodule: its weights have a name already
            self._forward_entry = self._select_forward()

    return GateHoistingRunner
