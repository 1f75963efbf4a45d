"""Tiny random transformers models: the smallest configurations that keep each model's own graph.

Every builder selects all experts for every token, so that no rounding difference can flip a routing
decision: what is left between two runs of a model is rounding alone.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

HIDDEN = 64
_EXPERTS = 4

_COMMON: dict[str, Any] = dict(
    vocab_size=32,
    hidden_size=HIDDEN,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    num_experts_per_tok=_EXPERTS,
    pad_token_id=0,
    use_cache=False,
)
_SHARED: dict[str, Any] = dict(
    num_experts=_EXPERTS, moe_intermediate_size=32, shared_expert_intermediate_size=64
)
_DELTA_NET: dict[str, Any] = dict(
    head_dim=16,
    layer_types=["full_attention", "full_attention"],
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
)

#: name -> (module, model class, config class, configuration)
_SPECS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "qwen2_moe": ("qwen2_moe", "Qwen2MoeModel", "Qwen2MoeConfig", _SHARED),
    "qwen3_next": ("qwen3_next", "Qwen3NextModel", "Qwen3NextConfig", _SHARED | _DELTA_NET),
    "qwen3_5_moe": (
        "qwen3_5_moe",
        "Qwen3_5MoeTextModel",
        "Qwen3_5MoeTextConfig",
        _SHARED | _DELTA_NET,
    ),
    "qwen3_omni_moe": (
        "qwen3_omni_moe",
        "Qwen3OmniMoeTalkerModel",
        "Qwen3OmniMoeTalkerTextConfig",
        _SHARED | dict(head_dim=16),
    ),
    "minimax": (
        "minimax",
        "MiniMaxModel",
        "MiniMaxConfig",
        dict(
            num_local_experts=_EXPERTS,
            head_dim=16,
            block_size=16,
            layer_types=["linear_attention", "full_attention"],
        ),
    ),
    "afmoe": (
        "afmoe",
        "AfmoeModel",
        "AfmoeConfig",
        dict(
            num_experts=_EXPERTS,
            moe_intermediate_size=32,
            num_shared_experts=1,
            num_dense_layers=1,
            head_dim=16,
        ),
    ),
    "deepseek_v3": (
        "deepseek_v3",
        "DeepseekV3Model",
        "DeepseekV3Config",
        dict(
            n_routed_experts=_EXPERTS,
            moe_intermediate_size=32,
            num_key_value_heads=4,
            kv_lora_rank=16,
            q_lora_rank=16,
            qk_rope_head_dim=8,
            v_head_dim=16,
            qk_nope_head_dim=16,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=0,
            num_hidden_layers=1,
        ),
    ),
    "llama4": (
        "llama4",
        "Llama4TextModel",
        "Llama4TextConfig",
        dict(
            num_hidden_layers=1,
            num_local_experts=_EXPERTS,
            intermediate_size_mlp=96,
            head_dim=16,
        ),
    ),
}

GATED = ("qwen2_moe", "qwen3_next", "qwen3_5_moe", "qwen3_omni_moe")
UNGATED = ("minimax", "afmoe", "deepseek_v3", "llama4")


class HiddenStates(nn.Module):
    """A model as a function of its input embeddings, [B, S, HIDDEN] -> [B, S, HIDDEN]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        return self.model(inputs_embeds=inputs_embeds, use_cache=False).last_hidden_state


def build(name: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> HiddenStates:
    """The tiny model `name` with random weights of order 1/sqrt(width), in eval mode.

    `overrides` are configuration fields; `experts` names transformers' experts implementation.
    Skips the test when the installed transformers has no such model.
    """
    pytest.importorskip("transformers")
    module_name, model_name, config_name, fields = _SPECS[name]
    try:
        package = f"transformers.models.{module_name}"
        configuration = importlib.import_module(f"{package}.configuration_{module_name}")
        modeling = importlib.import_module(f"{package}.modeling_{module_name}")
    except ImportError as error:
        pytest.skip(f"this transformers has no {module_name}: {error}")
    experts = overrides.pop("experts", "batched_mm")
    values = _COMMON | fields | overrides
    if "layer_types" in values:
        values["layer_types"] = values["layer_types"][: values["num_hidden_layers"]]
    config = getattr(configuration, config_name)(**values)
    config._experts_implementation = experts
    model = getattr(modeling, model_name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
    return HiddenStates(model).to(dtype)


def gates(model: nn.Module) -> int:
    """Number of shared-expert gates in the module tree."""
    return sum(name.endswith("shared_expert_gate") for name, _ in model.named_modules())


def embeddings(batch: int, length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random input embeddings [batch, length, HIDDEN]."""
    return torch.randn(batch, length, HIDDEN).to(dtype)
