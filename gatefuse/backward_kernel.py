"""Triton kernels of the gate's gradients and the rule by which they are launched.

With ``s = sigmoid(z)`` and ``dz = s (1 - s) sum(grad * value)`` of each row they compute
``grad_value = s * grad``, ``grad_input = dz * weight``, ``grad_weight = sum(dz * input)`` and
``grad_bias = sum(dz)``: in float32, rounded once. Each program walks over rows and keeps its part
of the sums over rows in registers; a second launch adds the parts in a fixed order, so that equal
inputs give equal bits. Bytes moved per row: ``D`` elements of grad, value and grad_value, ``H`` of
input and grad_input. What nobody wants is neither read nor written.

Importing this module imports Triton, so import it only when a kernel is about to be launched.
"""

# mypy: disable-error-code="no-untyped-def, assignment, unreachable"
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

__all__ = [
    "SUM_COLUMNS",
    "SUM_ROWS",
    "WIDEST",
    "BackwardConfig",
    "add_parts_kernel",
    "backward_config",
    "launch",
    "linear_sigmoid_mul_backward_kernel",
    "programs",
]

WIDEST = 8192
"""Widest row, in elements, that the kernel keeps in registers; it serves no wider one."""

SUM_ROWS, SUM_COLUMNS = 64, 16
"""Block of the sum over the programs' parts."""


class BackwardConfig(NamedTuple):
    """rows: rows per step of a program. per_sm: programs for each multiprocessor."""

    rows: int
    num_warps: int
    per_sm: int


@triton.jit
def _load_rows(ptr, row, columns, N, WIDTH: tl.constexpr, stride):
    """Whole rows, and zeros beyond them."""
    inside = (row < N) & (columns < WIDTH)
    return tl.load(ptr + row * stride + columns, mask=inside, other=0.0)


@triton.jit
def linear_sigmoid_mul_backward_kernel(
    grad_ptr,  # [N, D], inner stride 1
    value_ptr,  # [N, D], inner stride 1, or None where only grad_value is wanted
    input_ptr,  # [N, H], inner stride 1
    weight_ptr,  # [1, H], contiguous
    bias_ptr,  # [1] or None
    grad_value_ptr,  # [N, D], contiguous, or None, as what follows
    grad_input_ptr,  # [N, H], contiguous
    weight_parts_ptr,  # [programs, H], float32
    bias_parts_ptr,  # [programs], float32
    N,
    programs,
    grad_stride,  # row strides, in elements
    value_stride,
    input_stride,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,  # at least H
    BLOCK_D: tl.constexpr,  # at least D
    ROWS: tl.constexpr,
):
    """``ROWS`` rows in a step, whole and in registers; a program's steps are ``programs`` apart."""
    # The next rows are loaded before these are computed with, where there are three of each.
    PREFETCH: tl.constexpr = value_ptr is not None
    program = tl.program_id(0)
    r = tl.arange(0, ROWS)[:, None]
    h = tl.arange(0, BLOCK_H)[None, :]
    d = tl.arange(0, BLOCK_D)[None, :]
    weight = tl.load(weight_ptr + h, mask=h < H, other=0.0)
    if weight_parts_ptr is not None:
        weight_sum = tl.zeros([ROWS, BLOCK_H], dtype=tl.float32)
    if bias_parts_ptr is not None:
        bias_sum = tl.zeros([ROWS, 1], dtype=tl.float32)

    if PREFETCH:
        row = (program * ROWS + r).to(tl.int64)
        grad = _load_rows(grad_ptr, row, d, N, D, grad_stride)
        value = _load_rows(value_ptr, row, d, N, D, value_stride)
        x = _load_rows(input_ptr, row, h, N, H, input_stride)
    for first in range(program * ROWS, N, programs * ROWS):
        row = (first + r).to(tl.int64)  # N * H may exceed 2**31
        inside = row < N
        inside_d = inside & (d < D)
        inside_h = inside & (h < H)
        if PREFETCH:
            next_row = row + programs * ROWS
            next_grad = _load_rows(grad_ptr, next_row, d, N, D, grad_stride)
            next_value = _load_rows(value_ptr, next_row, d, N, D, value_stride)
            next_x = _load_rows(input_ptr, next_row, h, N, H, input_stride)
        else:
            grad = _load_rows(grad_ptr, row, d, N, D, grad_stride)
            x = _load_rows(input_ptr, row, h, N, H, input_stride)
        logit = tl.sum(x.to(tl.float32) * weight.to(tl.float32), axis=1, keep_dims=True)
        if bias_ptr is not None:
            logit += tl.load(bias_ptr).to(tl.float32)
        gate = tl.sigmoid(logit)
        if grad_value_ptr is not None:
            grad_value = (gate * grad.to(tl.float32)).to(grad_value_ptr.dtype.element_ty)
            tl.store(grad_value_ptr + row * D + d, grad_value, mask=inside_d)
        if value_ptr is not None:
            dot = tl.sum(grad.to(tl.float32) * value.to(tl.float32), axis=1, keep_dims=True)
            grad_logit = dot * gate * (1 - gate)
            if grad_input_ptr is not None:
                grad_input = grad_logit * weight.to(tl.float32)
                grad_input = grad_input.to(grad_input_ptr.dtype.element_ty)
                tl.store(grad_input_ptr + row * H + h, grad_input, mask=inside_h)
            if weight_parts_ptr is not None:
                weight_sum += grad_logit * x.to(tl.float32)
            if bias_parts_ptr is not None:
                bias_sum += grad_logit
        if PREFETCH:
            grad = next_grad
            value = next_value
            x = next_x

    if weight_parts_ptr is not None:
        h = tl.arange(0, BLOCK_H)
        parts = weight_parts_ptr + program.to(tl.int64) * H + h
        tl.store(parts, tl.sum(weight_sum, axis=0), mask=h < H)
    if bias_parts_ptr is not None:
        tl.store(bias_parts_ptr + program, tl.sum(tl.sum(bias_sum, axis=1), axis=0))


@triton.jit
def add_parts_kernel(
    weight_parts_ptr,  # [programs, H], float32, or None
    bias_parts_ptr,  # [programs], float32, or None
    grad_weight_ptr,  # [1, H], contiguous, or None
    grad_bias_ptr,  # [1], or None
    programs,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The sums over programs, each program ``COLUMNS`` columns; the first one also the bias."""
    r = tl.arange(0, ROWS)
    if weight_parts_ptr is not None:
        h = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
        for first in range(0, programs, ROWS):
            row = (first + r)[:, None]
            inside = (row < programs) & (h < H)[None, :]
            total += tl.load(weight_parts_ptr + row * H + h[None, :], mask=inside, other=0.0)
        grad_weight = tl.sum(total, axis=0).to(grad_weight_ptr.dtype.element_ty)
        tl.store(grad_weight_ptr + h, grad_weight, mask=h < H)
    if bias_parts_ptr is not None:
        if tl.program_id(0) == 0:
            sums = tl.zeros([ROWS], dtype=tl.float32)
            for first in range(0, programs, ROWS):
                inside = first + r < programs
                sums += tl.load(bias_parts_ptr + first + r, mask=inside, other=0.0)
            tl.store(grad_bias_ptr, tl.sum(sums, axis=0).to(grad_bias_ptr.dtype.element_ty))


def backward_config(h: int, d: int) -> BackwardConfig:
    """Launch rule for rows of ``h`` elements of input and ``d`` of value. It does not look at the
    number of rows, so a row's own gradients are the same however many others there are.

    Measured on an H200 in bfloat16 at widths of 2048 and 4096 and 256 to 65536 rows.
    """
    widest = max(h, d)
    if widest <= 4096:
        return BackwardConfig(2 if widest > 1024 else 4, 8, 2)
    return BackwardConfig(1, 16, 1)


def programs(rows: int | None, config: BackwardConfig, multiprocessors: int) -> int:
    """Programs of the first launch, for ``rows`` rows (None: symbolic); also of no rows."""
    most = multiprocessors * config.per_sm
    return most if rows is None else max(1, min(most, triton.cdiv(rows, config.rows)))


def launch(
    grad: torch.Tensor,
    value: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    grad_value: torch.Tensor | None,
    grad_input: torch.Tensor | None,
    grad_weight: torch.Tensor | None,
    grad_bias: torch.Tensor | None,
    *,
    multiprocessors: int,
    config: BackwardConfig | None = None,
) -> None:
    """Launch the kernels on the current stream; writes those of the gradients that are given.

    Shapes: grad, value, grad_value ``[N, D]``; input, grad_input ``[N, H]``; weight and grad_weight
    ``[1, H]`` contiguous; bias, grad_bias ``[1]``. Inner strides are 1,
    row strides are free but for the gradients, which are contiguous; H and D are at most
    :data:`WIDEST`. dtypes: float16, bfloat16 or float32; operands may differ in dtype. Nothing is
    checked: :mod:`gatefuse.gradients` does that.
    """
    (rows, h), d = input.shape, value.shape[1]
    config = backward_config(h, d) if config is None else config
    number = programs(rows, config, multiprocessors)
    of_logit = any(t is not None for t in (grad_input, grad_weight, grad_bias))
    weight_parts = bias_parts = None
    if grad_weight is not None:
        weight_parts = torch.empty(number, h, dtype=torch.float32, device=grad.device)
    if grad_bias is not None:
        bias_parts = torch.empty(number, dtype=torch.float32, device=grad.device)
    linear_sigmoid_mul_backward_kernel[(number,)](
        grad,
        value if of_logit else None,
        input,
        weight,
        bias,
        grad_value,
        grad_input,
        weight_parts,
        bias_parts,
        rows,
        number,
        grad.stride(0),
        value.stride(0),
        input.stride(0),
        H=h,
        D=d,
        BLOCK_H=triton.next_power_of_2(h),
        BLOCK_D=triton.next_power_of_2(d),
        ROWS=config.rows,
        num_warps=config.num_warps,
    )
    if weight_parts is not None or bias_parts is not None:
        columns = triton.cdiv(h, SUM_COLUMNS) if weight_parts is not None else 1
        add_parts_kernel[(columns,)](
            weight_parts,
            bias_parts,
            grad_weight,
            grad_bias,
            number,
            H=h,
            ROWS=SUM_ROWS,
            COLUMNS=SUM_COLUMNS,
            num_warps=4,
        )
