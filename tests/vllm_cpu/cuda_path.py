"""A vLLM plugin that makes vLLM on the CPU compile a model as it does on CUDA.

On CUDA linears are `aten.mm`, the MoE layer is an opaque op, and mode 3 compiles the pieces of the
model with vLLM's pass manager. On the CPU linears are packed, the MoE layer is traced into, and
mode 3 becomes mode 2: a test of a pass would pass there for other reasons.
"""

from __future__ import annotations

import os
from typing import Any

import torch

#: Variable: shared experts are on each rank whole, as Quark's OCP MX checkpoints have them.
REPLICATED = "CUDA_PATH_REPLICATED_EXPERTS"

_applied = False


def apply() -> None:
    """Entry point; idempotent."""
    global _applied
    if _applied:
        return
    _applied = True
    _plain_linears()
    _keep_mode_3()
    _opaque_moe()
    if os.environ.get(REPLICATED):
        _replicated_experts()


def _plain_linears() -> None:
    from vllm import _custom_ops
    from vllm.model_executor.layers import utils

    _custom_ops._supports_onednn = False
    utils.check_cpu_sgl_kernel = lambda *args, **kwargs: False


def _keep_mode_3() -> None:
    from vllm.compilation.passes.utility.fix_functionalization import FixFunctionalizationPass
    from vllm.config import CompilationMode
    from vllm.platforms.cpu import CpuPlatform

    plain = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        config = vllm_config.compilation_config
        mode = config.mode
        plain(cls, vllm_config)
        if mode == CompilationMode.VLLM_COMPILE:
            config.mode = mode
            config.backend = "inductor"
            config.compile_sizes = config.compile_sizes or []

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)
    # It names ops that only builds for CUDA have.
    FixFunctionalizationPass.__call__ = lambda self, graph: None


def _opaque_moe() -> None:
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    def _select_forward(self: Any) -> Any:
        if self._shared_experts is None:
            return torch.ops.vllm.moe_forward
        return torch.ops.vllm.moe_forward_shared

    MoERunner._select_forward = _select_forward


def _replicated_experts() -> None:
    from vllm.model_executor.models import qwen3_next

    qwen3_next._should_replicate_misaligned_shared_expert = lambda *args, **kwargs: True
