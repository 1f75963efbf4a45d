"""The operands of the op: their order, their checks, their rows, the dtype of their result."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["KERNEL_DTYPES", "Operands", "as_rows", "check", "check_tensors", "result_dtype"]

KERNEL_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32})
"""Element types that the Triton kernel reads and writes; it always computes in float32."""

_FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _shape(t: Tensor) -> str:
    return f"[{', '.join(map(str, t.shape))}]"


class Operands(NamedTuple):
    """What the op takes, in its order: tensors, or what stands for them in Inductor's IR."""

    input: Any
    weight: Any
    value: Any
    bias: Any = None
    addend: Any = None

    def present(self) -> list[Any]:
        """Those that are not None."""
        return [t for t in self if t is not None]

    def result_dtype(self) -> torch.dtype:
        """The promotion of the operands' dtypes."""
        return result_dtype(
            *(t.dtype if isinstance(t, Tensor) else t.get_dtype() for t in self.present())
        )


def check_tensors(operands: Operands) -> None:
    """Raise TypeError unless they are tensors, or None where they may be absent."""
    for name, t in operands._asdict().items():
        optional = name in ("bias", "addend")
        if not isinstance(t, Tensor) and not (optional and t is None):
            raise TypeError(
                f"gatefuse: {name} is of type {type(t).__name__}; expected a Tensor"
                f"{' or None' if optional else ''}"
            )


def check(operands: Operands) -> None:
    """Raise ValueError on a wrong shape or device, TypeError on a wrong dtype."""
    input, weight, value, bias, addend = operands
    for name, t in operands._asdict().items():
        if t is None:
            continue
        if t.dtype not in _FLOAT_DTYPES:
            raise TypeError(
                f"gatefuse: {name} has dtype {t.dtype}; expected one of "
                f"{', '.join(str(d) for d in _FLOAT_DTYPES)}"
            )
        if t.device != input.device:
            raise ValueError(
                f"gatefuse: {name} is on device {t.device}; expected {input.device}, where input is"
            )
    if input.dim() < 1:
        raise ValueError("gatefuse: input is a scalar; expected shape [..., H]")
    if value.dim() < 1:
        raise ValueError("gatefuse: value is a scalar; expected shape [..., D]")
    h = input.shape[-1]
    if weight.dim() != 2 or weight.shape[0] != 1 or weight.shape[1] != h:
        raise ValueError(
            f"gatefuse: weight has shape {_shape(weight)}; expected [1, {h}], one row as wide as "
            f"input {_shape(input)}"
        )
    if bias is not None and (bias.dim() > 1 or bias.numel() != 1):
        raise ValueError(f"gatefuse: bias has shape {_shape(bias)}; expected [1]")
    if math.prod(value.shape[:-1]) != math.prod(input.shape[:-1]):
        raise ValueError(
            f"gatefuse: value has shape {_shape(value)}; expected as many rows as input "
            f"{_shape(input)}"
        )
    if addend is not None and (
        addend.dim() != value.dim() or any(a != b for a, b in zip(addend.shape, value.shape))
    ):
        raise ValueError(
            f"gatefuse: addend has shape {_shape(addend)}; expected {_shape(value)}, as value has"
        )


def result_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The promotion of the operands' dtypes: the dtype of the result, or, given input, weight and
    bias alone, that of the linear."""
    return functools.reduce(torch.promote_types, dtypes)


def as_rows(t: Tensor) -> Tensor:
    """``t`` as ``[rows, width]`` with inner stride 1: a view where there is one, else a copy."""
    rows = (
        t.reshape(-1, t.shape[-1]) if t.numel() else t.new_empty(t.shape[:-1].numel(), t.shape[-1])
    )
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()
