"""Tiny checkpoints with random weights of models with a gate, the same in every run.

A folder holds config.json and a bfloat16 model.safetensors in the layout of Hugging Face. There is
no tokenizer: prompts are token ids.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.model_zoo import engine_config

_QWEN2 = engine_config("qwen2_moe", layers=2, tiny=True) | dict(max_position_embeddings=512)
_HYBRID = engine_config("qwen3_next", tiny=True) | dict(max_position_embeddings=512)
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2_moe": _QWEN2,
    # Qwen3-MoE has no shared expert; what derives from it may, as in Qwen3-Omni's talker.
    "qwen3_moe": _QWEN2
    | dict(architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", norm_topk_prob=True),
    # Three layers with a gated delta net and one with attention, as in the real models.
    "qwen3_5_moe": _HYBRID
    | dict(architectures=["Qwen3_5MoeForCausalLM"], model_type="qwen3_5_moe_text"),
    # With a draft of multi-token prediction, as the real one.
    "qwen3_next": _HYBRID | dict(num_nextn_predict_layers=1),
}


def build(folder: Path, name: str, gates: float = 1.0, **fields: Any) -> Path:
    """Write the model `name` of CONFIGS to a folder; returns the folder. gates: a factor of the
    weights of the shared experts' gates. fields: others of the configuration."""
    config = CONFIGS[name] | fields
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    generator = torch.Generator().manual_seed(0)
    weights = {
        key: _values(key, shape, generator, "full_attention_interval" in config)
        for key, shape in _shapes(config).items()
    }
    for key in weights:
        if "shared_expert_gate" in key:
            weights[key] *= gates
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _shapes(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    H, shapes = c["hidden_size"], {}
    shapes["model.embed_tokens.weight"] = (c["vocab_size"], H)
    for i in range(c["num_hidden_layers"]):
        attends = (i + 1) % c.get("full_attention_interval", 1) == 0
        shapes |= _layer(f"model.layers.{i}", c, attends)
    shapes["model.norm.weight"] = (H,)
    shapes["lm_head.weight"] = (c["vocab_size"], H)
    if c.get("num_nextn_predict_layers"):
        shapes["mtp.fc.weight"] = (H, 2 * H)
        norms = "pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"
        shapes |= {f"mtp.{norm}.weight": (H,) for norm in norms}
        shapes |= _layer("mtp.layers.0", c, attends=True)
    return shapes


def _layer(layer: str, c: dict[str, Any], attends: bool) -> dict[str, tuple[int, ...]]:
    H, shapes = c["hidden_size"], {}
    shapes[f"{layer}.input_layernorm.weight"] = (H,)
    shapes[f"{layer}.post_attention_layernorm.weight"] = (H,)
    if attends:
        gated = "full_attention_interval" in c
        shapes |= _attention(f"{layer}.self_attn", c, gated)
    else:
        shapes |= _delta_net(f"{layer}.linear_attn", c)
    shapes[f"{layer}.mlp.gate.weight"] = (c["num_experts"], H)
    shapes[f"{layer}.mlp.shared_expert_gate.weight"] = (1, H)
    shapes |= _mlp(f"{layer}.mlp.shared_expert", H, c["shared_expert_intermediate_size"])
    for e in range(c["num_experts"]):
        shapes |= _mlp(f"{layer}.mlp.experts.{e}", H, c["moe_intermediate_size"])
    return shapes


def _mlp(prefix: str, H: int, width: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.gate_proj.weight": (width, H),
        f"{prefix}.up_proj.weight": (width, H),
        f"{prefix}.down_proj.weight": (H, width),
    }


def _attention(prefix: str, c: dict[str, Any], gated: bool) -> dict[str, tuple[int, ...]]:
    """gated: queries come with a gate of the same size."""
    H, shapes = c["hidden_size"], {}
    head = c.get("head_dim", H // c["num_attention_heads"])
    kv = c["num_key_value_heads"]
    for which, heads in dict(q=c["num_attention_heads"] * (1 + gated), k=kv, v=kv).items():
        shapes[f"{prefix}.{which}_proj.weight"] = (heads * head, H)
        if c["model_type"] == "qwen2_moe":
            shapes[f"{prefix}.{which}_proj.bias"] = (heads * head,)
        elif which != "v":
            shapes[f"{prefix}.{which}_norm.weight"] = (head,)
    shapes[f"{prefix}.o_proj.weight"] = (H, c["num_attention_heads"] * head)
    return shapes


def _delta_net(prefix: str, c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    H, heads = c["hidden_size"], c["linear_num_value_heads"]
    keys = c["linear_num_key_heads"] * c["linear_key_head_dim"]
    values = heads * c["linear_value_head_dim"]
    if c["model_type"] == "qwen3_next":
        projections = dict(qkvz=2 * keys + 2 * values, ba=2 * heads)
    else:
        projections = dict(qkv=2 * keys + values, z=values, b=heads, a=heads)
    return {f"{prefix}.in_proj_{name}.weight": (rows, H) for name, rows in projections.items()} | {
        f"{prefix}.conv1d.weight": (2 * keys + values, 1, c["linear_conv_kernel_dim"]),
        f"{prefix}.A_log": (heads,),
        f"{prefix}.dt_bias": (heads,),
        f"{prefix}.norm.weight": (c["linear_value_head_dim"],),
        f"{prefix}.out_proj.weight": (H, values),
    }


def _values(
    key: str, shape: tuple[int, ...], generator: torch.Generator, hybrid: bool
) -> torch.Tensor:
    """Normal values, of a size that keeps activations near 1."""
    values = torch.randn(shape, generator=generator)
    if key.endswith("A_log"):
        values = values.abs()
    elif "norm" in key:
        # The hybrid models multiply by 1 + weight, except in their delta nets.
        values = 0.05 * values + float(not hybrid or "linear_attn" in key)
    elif "embed_tokens" not in key:
        values *= 0.1 if len(shape) == 1 else 1 / math.sqrt(math.prod(shape[1:]))
    return values.bfloat16()
