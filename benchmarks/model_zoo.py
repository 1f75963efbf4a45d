"""Models with random weights, for benchmarks and tests: tiny ones of transformers, single modules
of transformers at their real widths, and configurations for engines of vLLM.
"""

from __future__ import annotations

import importlib
from typing import Any

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


def _modeling(name: str) -> Any:
    """The module of transformers that defines a model."""
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


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
    Raises ImportError where the installed transformers has no such model.
    """
    class_name, fields = _SPECS[name]
    model_class = getattr(_modeling(name), class_name)
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


# Modules at their real widths.

CLASSES = {"qwen3_next": "Qwen3Next", "qwen2_moe": "Qwen2Moe"}
FULL_ATTENTION_LAYER = 3  # of Qwen3-Next, whose other layers are gated delta nets
DECODE_TOKENS = 256

SMALL: dict[str, Any] = dict(
    hidden_size=64, moe_intermediate_size=32, shared_expert_intermediate_size=64
) | dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16)
"""Sizes for a try without a GPU."""


def module_config(name: str, small: bool = False) -> Any:
    """The model's own sizes, which are the defaults of the configurations, with few experts: as
    many as a token is routed to, and up to a multiple of eight. Of other widths of the router's
    product Inductor pads some, as a measurement of its own turns out."""
    model_class = getattr(_modeling(name), f"{CLASSES[name]}Model")
    config = model_class.config_class(**(SMALL if small else {}))
    config.num_experts = -(-config.num_experts_per_tok // 8) * 8
    config._experts_implementation = "grouped_mm"  # the others break the graph or copy weights
    config._attn_implementation = "sdpa"
    return config


def module(
    name: str, part: str, tokens: int, device: str, small: bool = False
) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The sparse MoE ``"block"`` or a decoder ``"layer"`` with full attention, bfloat16, and its
    inputs: hidden states, and the rotary embedding's cosine and sine. Up to DECODE_TOKENS tokens
    are a batch of single tokens (decode), more are one sequence (prefill)."""
    config = module_config(name, small)
    classes = _modeling(name)
    prefix = CLASSES[name]
    shape = (tokens, 1) if tokens <= DECODE_TOKENS else (1, tokens)
    with torch.device(device):
        if part == "block":
            made = getattr(classes, f"{prefix}SparseMoeBlock")(config)
        else:
            made = getattr(classes, f"{prefix}DecoderLayer")(config, FULL_ATTENTION_LAYER)
        for parameter in made.parameters():
            if parameter.dim() == 1:
                nn.init.uniform_(parameter, 0.5, 1.5)
            else:
                nn.init.normal_(parameter, std=0.02)
        hidden = torch.randn(*shape, config.hidden_size, dtype=torch.bfloat16)
        positions = torch.arange(shape[1]).expand(shape)
        cos, sin = getattr(classes, f"{prefix}RotaryEmbedding")(config)(hidden, positions)
    return made.to(torch.bfloat16).eval(), (hidden, cos, sin)


# Configurations of whole models, as vLLM reads them.

_ENGINE: dict[str, Any] = (
    dict(torch_dtype="bfloat16", vocab_size=151936, hidden_size=2048, num_attention_heads=16)
    | dict(decoder_sparse_step=1, mlp_only_layers=[], hidden_act="silu", rms_norm_eps=1e-6)
    | dict(max_position_embeddings=8192, tie_word_embeddings=False)
    | dict(bos_token_id=1, eos_token_id=2)
)
ENGINE_MODELS: dict[str, dict[str, Any]] = {
    # Qwen/Qwen1.5-MoE-A2.7B: 29 GB
    "qwen2_moe": _ENGINE
    | dict(architectures=["Qwen2MoeForCausalLM"], model_type="qwen2_moe", num_hidden_layers=24)
    | dict(num_key_value_heads=16, intermediate_size=5632, moe_intermediate_size=1408)
    | dict(shared_expert_intermediate_size=5632, num_experts=60, num_experts_per_tok=4)
    | dict(norm_topk_prob=False, rope_theta=1e6),
    # Qwen/Qwen3-Next-80B-A3B: 12 of its 48 layers have 39 GB
    "qwen3_next": _ENGINE
    | dict(architectures=["Qwen3NextForCausalLM"], model_type="qwen3_next", num_hidden_layers=12)
    | dict(num_key_value_heads=2, head_dim=256, intermediate_size=5120, moe_intermediate_size=512)
    | dict(shared_expert_intermediate_size=512, num_experts=512, num_experts_per_tok=10)
    | dict(norm_topk_prob=True, full_attention_interval=4, partial_rotary_factor=0.25)
    | dict(linear_conv_kernel_dim=4, linear_key_head_dim=128, linear_value_head_dim=128)
    | dict(linear_num_key_heads=16, linear_num_value_heads=32, rope_theta=1e7),
}
_ENGINE_TINY: dict[str, Any] = (
    dict(num_hidden_layers=4, vocab_size=512, hidden_size=128, head_dim=32)
    | dict(num_attention_heads=4, num_key_value_heads=2, intermediate_size=256)
    | dict(moe_intermediate_size=64, shared_expert_intermediate_size=128, num_experts=4)
    | dict(num_experts_per_tok=2, linear_key_head_dim=64, linear_value_head_dim=64)
    | dict(linear_num_key_heads=2, linear_num_value_heads=4)
)


def engine_config(name: str, layers: int | None = None, tiny: bool = False) -> dict[str, Any]:
    """The content of a model's config.json; layers: another number of them."""
    config = ENGINE_MODELS[name] | (_ENGINE_TINY if tiny else {})
    return config | ({"num_hidden_layers": layers} if layers else {})
