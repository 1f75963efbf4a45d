"""The models of the demo: classes of transformers, small or wide, with random weights."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

MODELS = ("qwen2_moe", "qwen3_next")
"""The model types that the demo builds."""


def _config(name: str, wide: bool) -> Any:
    """A configuration of model type ``name``: tiny, or as wide as the real model with few layers
    and experts."""
    from transformers import Qwen2MoeConfig, Qwen3NextConfig

    hidden = 2048 if wide else 64
    experts = 8 if wide else 4
    sizes: dict[str, Any] = {
        "vocab_size": 256,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "moe_intermediate_size": hidden // 2,
        "shared_expert_intermediate_size": hidden,
        "num_attention_heads": 16 if wide else 4,
        "num_key_value_heads": 2,
        "num_experts": experts,
        # The comparison routes every token to every expert: were some left out, one rounding could
        # choose other experts and the results would have nothing to do with each other.
        "num_experts_per_tok": experts // 2 if wide else experts,
        "decoder_sparse_step": 1,
        "max_position_embeddings": 8192,
        # Gates far enough from one half that a wrong one is seen, and rounding errors that stay
        # small from layer to layer.
        "initializer_range": 0.02 if wide else 0.05,
        "use_cache": False,
    }
    if name == "qwen2_moe":
        return Qwen2MoeConfig(num_hidden_layers=2, **sizes)
    if name == "qwen3_next":
        # The model has three gated delta nets for each layer with attention. transformers writes
        # them as Python loops, which take most of a compilation and, without kernels of their own,
        # of a forward pass: one is enough for the comparison, and none is timed.
        kinds = ("full_attention" if wide else "linear_attention", "full_attention")
        return Qwen3NextConfig(
            num_hidden_layers=len(kinds),
            layer_types=list(kinds),
            head_dim=128 if wide else 16,
            linear_num_key_heads=16 if wide else 2,
            linear_num_value_heads=32 if wide else 4,
            linear_key_head_dim=128 if wide else 16,
            linear_value_head_dim=128 if wide else 16,
            **sizes,
        )
    raise ValueError(f"unknown model {name!r}; the models are {', '.join(MODELS)}")


def build(name: str, wide: bool, device: torch.device, dtype: torch.dtype) -> Any:
    """A causal language model of transformers with random weights, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(_config(name, wide), dtype=dtype)
    model = model.to(device).eval()
    # transformers falls back to a Python loop over the experts that were hit, which breaks the
    # graph, where it finds no grouped matrix product.
    if getattr(model.config, "_experts_implementation", None) == "eager":
        model.set_experts_implementation("batched_mm")
    return model


def count_gates(model: nn.Module) -> int:
    """Shared-expert gates in the module tree."""
    return sum(
        isinstance(module, nn.Linear)
        and module.out_features == 1
        and path.endswith("shared_expert_gate")
        for path, module in model.named_modules()
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No advice from transformers, Dynamo and Inductor on how transformers is written or installed
    and what Inductor makes of it."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            for message in (
                "Dynamo detected a call to a `functools",
                r"\s*Online softmax is disabled on the fly",
                "TensorFloat32 tensor cores for float32 matrix multiplication",
            ):
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        logging.set_verbosity(verbosity)


def forward(model: Any, ids: Tensor) -> Tensor:
    """Logits ``[batch, length, vocabulary]`` of token ids ``[batch, length]``."""
    return model(input_ids=ids, use_cache=False).logits
