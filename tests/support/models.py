"""The tiny models of the zoo with random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import model_zoo

HIDDEN = model_zoo.SIZES["widths"]["hidden_size"]

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
    The test skips where the installed transformers has no such model.
    """
    experts = overrides.pop("experts", "batched_mm")
    try:
        model_class, config = model_zoo.tiny(name, **overrides)
    except ImportError as error:
        pytest.skip(f"this transformers has no {name}: {error}")
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
