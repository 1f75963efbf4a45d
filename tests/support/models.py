"""Tiny models of transformers with random weights."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

HIDDEN = 64
_EXPERTS = 4

_COMMON: dict[str, Any] = (
    dict(vocab_size=32, hidden_size=HIDDEN, intermediate_size=96, num_hidden_layers=2)
    | dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    | dict(num_experts_per_tok=_EXPERTS, moe_intermediate_size=32, pad_token_id=0, use_cache=False)
)
_SHARED: dict[str, Any] = dict(num_experts=_EXPERTS, shared_expert_intermediate_size=64)
_DELTA_NET: dict[str, Any] = dict(
    head_dim=16, layer_types=["full_attention", "full_attention"], linear_key_head_dim=16
) | dict(linear_value_head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4)

#: name, which is its module's, -> (model class, configuration)
_SPECS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_moe": ("Qwen2MoeModel", _SHARED),
    "qwen3_next": ("Qwen3NextModel", _SHARED | _DELTA_NET),
    "qwen3_5_moe": ("Qwen3_5MoeTextModel", _SHARED | _DELTA_NET),
    "qwen3_omni_moe": ("Qwen3OmniMoeTalkerModel", _SHARED | dict(head_dim=16)),
    "minimax": (
        "MiniMaxModel",
        dict(num_local_experts=_EXPERTS, head_dim=16, block_size=16)
        | dict(layer_types=["linear_attention", "full_attention"]),
    ),
    "afmoe": (
        "AfmoeModel",
        dict(num_experts=_EXPERTS, num_shared_experts=1, num_dense_layers=1, head_dim=16),
    ),
    "deepseek_v3": (
        "DeepseekV3Model",
        dict(n_routed_experts=_EXPERTS, num_key_value_heads=4, num_hidden_layers=1)
        | dict(kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, v_head_dim=16)
        | dict(qk_nope_head_dim=16, n_group=1, topk_group=1, first_k_dense_replace=0),
    ),
    "llama4": (
        "Llama4TextModel",
        dict(num_hidden_layers=1, num_local_experts=_EXPERTS, intermediate_size_mlp=96)
        | dict(head_dim=16),
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
    """The tiny model `name` with random weights of order 1/sqrt(width), in eval mode: the smallest
    configuration that keeps the model's own graph. All experts are selected for every token, so no
    rounding difference can flip a routing decision.

    `overrides` are configuration fields; `experts` names transformers' experts implementation.
    The test skips where the installed transformers has no such model.
    """
    class_name, fields = _SPECS[name]
    try:
        modeling = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    except ImportError as error:
        pytest.skip(f"this transformers has no {name}: {error}")
    model_class = getattr(modeling, class_name)
    experts = overrides.pop("experts", "batched_mm")
    values = _COMMON | fields | overrides
    if "layer_types" in values:
        values["layer_types"] = values["layer_types"][: values["num_hidden_layers"]]
    config = model_class.config_class(**values)
    config._experts_implementation = experts
    model = model_class(config).eval()
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
