"""Tiny quantised checkpoints with random codes, and an adapter; the layouts of their formats.

Weights have the size of tests/vllm_cpu/tiny.py's. Gates, routers, norms and embeddings are not
quantised, as in published checkpoints.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.vllm_cpu import tiny

MODEL = "qwen2_moe"
# Inductor pads rows of fewer logits, and vLLM reads them as if it had not (vllm#56900).
EXPERTS = dict(num_experts=8, num_experts_per_tok=8)
WIDTHS = dict(  # multiples of what the kernels for four bits ask for
    **dict(hidden_size=256, moe_intermediate_size=128, shared_expert_intermediate_size=256),
    **dict(head_dim=64, num_attention_heads=4),
    **EXPERTS,
)
GROUP = 128
PLAIN = ["lm_head"] + [
    f"model.layers.{i}.mlp.{gate}" for i in range(2) for gate in ("gate", "shared_expert_gate")
]

Tensors = dict[str, torch.Tensor]


def _codes(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64).to(torch.int32)


def _scales(shape: tuple[int, int], K: int, code: float) -> torch.Tensor:
    """code: the root mean square of the codes."""
    return torch.full(shape, 1 / code / math.sqrt(K), dtype=torch.bfloat16)


INT4, E2M1 = 4.6, 2.9  # root mean squares of uniform codes


def _gptq(N: int, K: int) -> Tensors:
    return {
        "qweight": _codes(K // 8, N),
        "qzeros": torch.full((K // GROUP, N // 8), 0x77777777, dtype=torch.int32),
        "scales": _scales((K // GROUP, N), K, INT4),
        "g_idx": (torch.arange(K) // GROUP).to(torch.int32),
    }


def _awq(N: int, K: int) -> Tensors:
    return {
        "qweight": _codes(K, N // 8),
        "qzeros": torch.full((K // GROUP, N // 8), 0x88888888 - 2**32, dtype=torch.int32),
        "scales": _scales((K // GROUP, N), K, INT4),
    }


def _w4a16(N: int, K: int) -> Tensors:
    return {
        "weight_packed": _codes(N, K // 8),
        "weight_scale": _scales((N, K // GROUP), K, INT4),
        "weight_shape": torch.tensor([N, K]),
    }


def _nvfp4(N: int, K: int) -> Tensors:
    return {
        "weight_packed": _codes(N, K // 8).view(torch.uint8),
        "weight_scale": torch.ones(N, K // 16).to(torch.float8_e4m3fn),
        "weight_global_scale": torch.tensor([E2M1 * math.sqrt(K)]),
        "input_global_scale": torch.tensor([448 * 6 / 10.0]),
    }


def _block_fp8(N: int, K: int) -> Tensors:
    return {
        "weight": torch.randn(N, K).to(torch.float8_e4m3fn),
        "weight_scale_inv": torch.full((-(-N // 128), -(-K // 128)), 1 / math.sqrt(K)),
    }


def _compressed(format: str, **weights: Any) -> dict[str, Any]:
    group: dict[str, Any] = {"targets": ["Linear"], "weights": dict(symmetric=True, **weights)}
    if weights["type"] == "float":
        group["input_activations"] = group["weights"] | {"dynamic": "local"}
    return dict(
        quant_method="compressed-tensors", format=format, config_groups={"a": group}, ignore=PLAIN
    )


_FOUR_BITS: dict[str, Any] = dict(bits=4, group_size=GROUP)
FORMATS: dict[str, tuple[Callable[[int, int], Tensors], dict[str, Any]]] = {
    "gptq": (_gptq, _FOUR_BITS | dict(quant_method="gptq", desc_act=False, sym=True)),
    "awq": (
        _awq,
        _FOUR_BITS
        | dict(quant_method="awq", zero_point=True, version="gemm", modules_to_not_convert=PLAIN),
    ),
    "compressed-tensors W4A16": (
        _w4a16,
        _compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=GROUP),
    ),
    "compressed-tensors NVFP4": (
        _nvfp4,
        _compressed(
            "nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16
        ),
    ),
    "block FP8": (
        _block_fp8,
        dict(
            **dict(quant_method="fp8", fmt="e4m3", activation_scheme="dynamic"),
            **dict(weight_block_size=[128, 128], modules_to_not_convert=PLAIN),
        ),
    ),
}
#: Arguments of engines. What vLLM would choose for four bits need not be built for the GPU; the
#: graph around the experts is the same.
BACKENDS = {format: {"moe_backend": "emulation"} for format in FORMATS if format != "block FP8"}
BACKENDS["compressed-tensors NVFP4"] |= {"linear_backend": "emulation"}


def build(folder: Path, format: str | None = None) -> Path:
    """Write the model in one of FORMATS, or in bfloat16, to a folder; returns the folder."""
    tiny.build(folder, MODEL, **WIDTHS)
    if format is None:
        return folder
    make, config = FORMATS[format]
    torch.manual_seed(0)
    weights = load_file(folder / "model.safetensors")
    for key, weight in list(weights.items()):
        module = key.removesuffix(".weight")
        if weight.dim() == 2 and module not in (*PLAIN, "model.embed_tokens"):
            del weights[key]
            weights |= {f"{module}.{k}": v for k, v in make(*weight.shape).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | {"quantization_config": config}))
    return folder


RANK = 8
ADAPTED = ["q_proj", "k_proj", "v_proj", "o_proj"]


def build_adapter(folder: Path, base: Path) -> Path:
    """Write an adapter of the attention's linears of the model in ``base``, as PEFT does."""
    folder.mkdir()
    torch.manual_seed(1)
    weights = {}
    for key, weight in load_file(base / "model.safetensors").items():
        if key.split(".")[-2] in ADAPTED and weight.dim() == 2:
            N, K = weight.shape
            prefix = "base_model.model." + key.removesuffix(".weight")
            weights[f"{prefix}.lora_A.weight"] = torch.randn(RANK, K) / math.sqrt(K)
            weights[f"{prefix}.lora_B.weight"] = torch.randn(N, RANK) / math.sqrt(RANK)
    save_file(weights, folder / "adapter_model.safetensors")
    config = dict(peft_type="LORA", r=RANK, lora_alpha=RANK, target_modules=ADAPTED, bias="none")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
