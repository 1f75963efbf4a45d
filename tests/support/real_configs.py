"""The published config.json of real models, as far as it decides what their graphs look like."""

from __future__ import annotations

from typing import Any

_DELTA_NET: dict[str, Any] = dict(
    linear_conv_kernel_dim=4,
    linear_key_head_dim=128,
    linear_num_key_heads=16,
    linear_value_head_dim=128,
)
_COMMON: dict[str, Any] = dict(
    full_attention_interval=4,
    head_dim=256,
    hidden_act="silu",
    max_position_embeddings=262144,
    num_experts=512,
    num_experts_per_tok=10,
    num_key_value_heads=2,
    rms_norm_eps=1e-06,
)

QWEN3_NEXT_80B: dict[str, Any] = (
    dict(architectures=["Qwen3NextForCausalLM"], model_type="qwen3_next", torch_dtype="bfloat16")
    | _COMMON
    | _DELTA_NET
    | dict(decoder_sparse_step=1, mlp_only_layers=[], norm_topk_prob=True, vocab_size=151936)
    | dict(hidden_size=2048, intermediate_size=5120, num_hidden_layers=48, num_attention_heads=16)
    | dict(moe_intermediate_size=512, shared_expert_intermediate_size=512)
    | dict(linear_num_value_heads=32, tie_word_embeddings=False, use_cache=True)
)

QWEN3_5_397B: dict[str, Any] = dict(
    architectures=["Qwen3_5MoeForConditionalGeneration"],
    model_type="qwen3_5_moe",
    text_config=dict(model_type="qwen3_5_moe_text", dtype="bfloat16", vocab_size=248320)
    | _COMMON
    | _DELTA_NET
    | dict(hidden_size=4096, num_hidden_layers=60, num_attention_heads=32)
    | dict(moe_intermediate_size=1024, shared_expert_intermediate_size=1024)
    | dict(linear_num_value_heads=64),
    vision_config=dict(model_type="qwen3_5_moe", depth=27, hidden_size=1152),
)
