"""The op's gradients: ``linear_sigmoid_mul_backward``, and when it serves.

``torch.ops.gatefuse.linear_sigmoid_mul_backward(grad, input, weight, value, bias, needed)``
returns the gradients of input, weight, value and bias; of those not needed, as of any that ATen
does not compute, nothing. On a CUDA, HIP or XPU device it is two launches of Triton kernels,
elsewhere plain ATen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gatefuse import formulas
from gatefuse.operands import KERNEL_DTYPES, Operands, as_rows

__all__ = ["gradients"]

_LIBRARY = torch.library.Library("gatefuse", "FRAGMENT")
_LIBRARY.define(
    "linear_sigmoid_mul_backward(Tensor grad, Tensor input, Tensor weight, Tensor value,"
    " Tensor? bias, bool[4] needed) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)

_PLAIN = (Tensor, torch.nn.Parameter)


def gradients(grad: Tensor, operands: Operands, needed: Operands) -> Operands:
    """The gradients of the operands but for the addend, None where they are not needed.

    By the op; by its formula, which can be traced and differentiated further, where something
    looks on: a tracer, a second derivative, a subclass of Tensor.
    """
    tensors = (grad, *operands.present())
    if (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or any(type(t) not in _PLAIN for t in tensors)
    ):
        return formulas.gradients(grad, operands, needed)
    input, weight, value, bias, _ = operands
    op = torch.ops.gatefuse.linear_sigmoid_mul_backward.default
    return Operands(*op(grad, input, weight, value, bias, needed[:4]))


def _triton(grad: Tensor, operands: Operands, needed: Operands) -> Operands | None:
    """The kernels' results, or None where ATen has to serve."""
    input, weight, value, bias, _ = operands
    try:
        from gatefuse import backward_kernel
    except ImportError:  # a device without Triton
        return None
    if not KERNEL_DTYPES.issuperset(t.dtype for t in (grad, *operands.present())):
        return None
    widths = input.shape[-1], value.shape[-1]
    if not 0 < min(widths) <= max(widths) <= backward_kernel.WIDEST:
        return None
    wanted = Operands(
        *(
            torch.empty(t.shape, dtype=t.dtype, device=t.device) if t is not None and need else None
            for t, need in zip(operands, needed)
        )
    )
    rows = Operands(
        None if wanted.input is None else wanted.input.view(-1, widths[0]),
        wanted.weight,
        None if wanted.value is None else wanted.value.view(-1, widths[1]),
        wanted.bias,
    )
    device = torch.get_device_module(value.device.type)
    with device.device(value.device):
        properties = device.get_device_properties(value.device)
        backward_kernel.launch(
            as_rows(grad),
            as_rows(value),
            as_rows(input),
            weight.contiguous(),
            bias,
            rows.value,
            rows.input,
            rows.weight,
            rows.bias,
            multiprocessors=multiprocessors(properties),
        )
    return wanted


def multiprocessors(properties: Any) -> int:
    """Of a device, by what PyTorch or Inductor knows of it; of an XPU its subslices."""
    for name in ("multi_processor_count", "gpu_subslice_count"):
        if (count := getattr(properties, name, None)) is not None:
            return int(count)
    return 64


def _implement(key: str, gpu: bool) -> None:
    def linear_sigmoid_mul_backward(
        grad: Tensor,
        input: Tensor,
        weight: Tensor,
        value: Tensor,
        bias: Tensor | None,
        needed: list[bool],
    ) -> tuple[Tensor | None, ...]:
        operands = Operands(input, weight, value, bias)
        wanted = Operands(*needed)
        found = _triton(grad, operands, wanted) if gpu else None
        return (found or formulas.gradients(grad, operands, wanted))[:4]

    _LIBRARY.impl("linear_sigmoid_mul_backward", linear_sigmoid_mul_backward, key)


_implement("CompositeExplicitAutograd", gpu=False)
for _key in ("CUDA", "XPU"):  # HIP devices dispatch as CUDA
    _implement(_key, gpu=True)


@torch.library.register_fake("gatefuse::linear_sigmoid_mul_backward", lib=_LIBRARY)
def _fake(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    value: Tensor,
    bias: Tensor | None,
    needed: list[bool],
) -> tuple[Tensor | None, ...]:
    operands = (input, weight, value, bias)
    return tuple(
        None if t is None or not need else torch.empty(t.shape, dtype=t.dtype, device=t.device)
        for t, need in zip(operands, needed)
    )
