"""The models of benchmarks and tests: modules at real widths, tiny models, engines."""

from __future__ import annotations

import importlib
import json
import tomllib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

HERE = Path(__file__).parent
SIZES = tomllib.loads((HERE / "models.toml").read_text())


def modeling_of(name: str) -> Any:
    """The module of transformers that defines a model."""
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


FULL_ATTENTION_LAYER = 3  # of Qwen3-Next, whose other layers are gated delta nets
DECODE_TOKENS = 256


def tiny(name: str, **fields: Any) -> tuple[type[nn.Module], Any]:
    """transformers' class of a model and its smallest configuration that keeps the model's graph;
    ``fields``: others of the configuration."""
    model_class = getattr(modeling_of(name), SIZES["models"][name]["class"])
    values = SIZES["widths"] | SIZES["tiny"] | SIZES["models"][name] | fields
    del values["class"]
    if "layer_types" in values:
        values["layer_types"] = values["layer_types"][: values["num_hidden_layers"]]
    return model_class, model_class.config_class(**values)


def module_config(name: str, small: bool = False) -> Any:
    """The model's own sizes, which are the defaults of the configurations. Of experts as many as a
    token is routed to, up to a multiple of eight: some other widths Inductor pads, some not."""
    model_class = getattr(modeling_of(name), SIZES["models"][name]["class"])
    config = model_class.config_class(**(SIZES["widths"] if small else {}))
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
    classes = modeling_of(name)
    prefix = SIZES["models"][name]["class"].removesuffix("Model")
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


CONFIGS = HERE.parent / "examples" / "configs"
# Qwen3-Next in bfloat16: 12 of its 48 layers have 39 GB; in block FP8 24 have 41 GB.
_NEXT = dict(rope_theta=1e7, partial_rotary_factor=0.25, bos_token_id=1, eos_token_id=2)
_BF16 = ("mlp.gate", "mlp.shared_expert_gate", "linear_attn.in_proj_ba", "linear_attn.conv1d")
_KEPT = [f"model.layers.{i}.{part}" for i in range(48) for part in _BF16]
_FP8 = dict(quant_method="fp8", fmt="e4m3", activation_scheme="dynamic")
_FP8 |= dict(weight_block_size=[128, 128], modules_to_not_convert=["lm_head", *_KEPT])
_IN_FP8 = dict(num_hidden_layers=24, quantization_config=_FP8)
ENGINE_MODELS: dict[str, tuple[str, dict[str, Any]]] = {  # a file of CONFIGS, and what differs
    "qwen2_moe": ("qwen1.5-moe-a2.7b", {}),
    "qwen2_moe_fp8": ("qwen1.5-moe-a2.7b", _IN_FP8),
    "qwen3_next": ("qwen3-next-80b-a3b", _NEXT | dict(num_hidden_layers=12)),
    "qwen3_next_fp8": ("qwen3-next-80b-a3b", _NEXT | _IN_FP8),
}


def engine_config(name: str, layers: int | None = None, tiny: bool = False) -> dict[str, Any]:
    """The content of a model's config.json; layers: another number of them."""
    file, other = ENGINE_MODELS[name]
    published = json.loads((CONFIGS / f"{file}.json").read_text())
    config: dict[str, Any] = published | other | (SIZES["engine"] if tiny else {})
    return config | ({"num_hidden_layers": layers} if layers else {})
