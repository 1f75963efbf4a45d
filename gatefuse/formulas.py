"""The op and its gradients in plain ATen: what runs without a kernel, and what is traced."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from gatefuse import compat, settings
from gatefuse.operands import Operands, result_dtype

__all__ = ["batch_invariant", "gradients", "value_and_logit"]


def batch_invariant() -> bool:
    """Whether a row's result must not depend on the number of rows."""
    return compat.batch_invariant() or (
        "GATEFUSE_BATCH_INVARIANT" in os.environ and settings.flag("GATEFUSE_BATCH_INVARIANT")
    )


def _logit_and_gate(
    input: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Both ``[..., 1]`` in ``dtype``."""
    x, w = input.to(dtype), weight.to(dtype)
    b = None if bias is None else bias.reshape(1).to(dtype)
    if batch_invariant():
        # Matrix products are not; nor is a vectorised sigmoid, in the last place of its tail.
        logit = (x * w).sum(-1, keepdim=True)
        logit = logit if b is None else logit + b
        return logit, torch.sigmoid(logit.double()).to(dtype)
    logit = torch.nn.functional.linear(x, w, b)
    return logit, torch.sigmoid(logit)


def value_and_logit(operands: Operands, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Result and logits, both in ``dtype``."""
    input, weight, value, bias, addend = operands
    logit, gate = _logit_and_gate(input, weight, bias, dtype)
    out = gate.reshape(*value.shape[:-1], 1) * value.to(dtype)
    return (out if addend is None else out + addend.to(dtype)), logit


def gradients(grad: Tensor, operands: Operands, needed: Operands) -> Operands:
    """The gradients of those operands that ``needed`` says, each in its operand's dtype, None for
    the others; the addend's, which is ``grad``, is left out.

    Computed in float32, or float64 if a tensor is.
    """
    input, weight, value, bias, _ = operands
    dtype = result_dtype(torch.float32, *(t.dtype for t in (input, weight, value, grad)))
    g = grad.to(dtype)
    _, s = _logit_and_gate(input, weight, bias, dtype)
    s = s.reshape(*input.shape[:-1], 1)
    grad_input = grad_weight = grad_bias = grad_value = None
    if needed.value:
        grad_value = (s.reshape(*value.shape[:-1], 1) * g).to(value.dtype)
    if needed.input or needed.weight or needed.bias:
        grad_z = (g * value.to(dtype)).sum(-1, keepdim=True).reshape(s.shape) * s * (1 - s)
        if needed.input:
            grad_input = (grad_z * weight.to(dtype)).to(input.dtype)
        if needed.weight:
            x = input.reshape(-1, input.shape[-1]).to(dtype)
            grad_weight = (grad_z.reshape(1, -1) @ x).to(weight.dtype)
        if needed.bias and bias is not None:
            grad_bias = grad_z.sum().reshape(bias.shape).to(bias.dtype)
    return Operands(grad_input, grad_weight, grad_value, grad_bias)
