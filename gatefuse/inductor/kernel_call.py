"""The launch of the Triton kernel from Inductor's generated code, with no dispatcher call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch._inductor import ir
from torch._inductor.lowering import lowerings
from torch._inductor.virtualized import V

from gatefuse.operands import KERNEL_DTYPES, Operands

__all__ = ["kernel_problem", "lower_kernel", "problem_of"]

aten = torch.ops.aten


def kernel_problem(operands: Operands) -> str | None:
    """Why the Triton kernel cannot serve these operands (Inductor's IR), or None."""
    try:
        import gatefuse.kernels  # noqa: F401
    except ImportError:
        if operands.value.get_device().type != "cpu":
            return "Triton is not installed"
    return problem_of(
        operands.value.get_device().type,
        [t.get_dtype() for t in operands.present()],
        all(_static(t.get_size()[-1]) is not None for t in (operands.input, operands.value)),
    )


def problem_of(device_type: str, dtypes: Sequence[torch.dtype], static_widths: bool) -> str | None:
    """The same for a device with Triton; the dtypes are those of all operands, the widths those of
    input and value."""
    if device_type == "cpu":
        return "Inductor's C++ serves the CPU"
    if device_type not in ("cuda", "xpu"):
        return f"the kernel is not written for {device_type}"
    if not KERNEL_DTYPES.issuperset(dtypes):
        return "the kernel does not take these dtypes"
    if not static_widths:
        return "a width is symbolic, and the kernel is compiled for one width"
    return None


def lower_kernel(
    operands: Operands, logit_dtype: torch.dtype | None, *, batch_invariant: bool
) -> tuple[Any, Any]:
    """The result and, if ``logit_dtype`` is given, the logits, as buffers that a launch writes.

    batch_invariant: launch in a shape that does not depend on the number of rows.
    """
    import triton
    from torch._higher_order_ops.triton_kernel_wrap import (
        kernel_side_table,
        triton_kernel_wrapper_mutation,
    )

    from gatefuse import kernels

    input, weight, value, bias, addend = operands
    size = list(value.get_size())
    h, d = int(input.get_size()[-1]), int(size[-1])
    rows = sympy.prod(size[:-1]) if size[:-1] else sympy.Integer(1)
    input_rows, input_stride = _rows_of(input)
    value_rows, value_stride = _rows_of(value)
    addend_rows, addend_stride = (None, 0) if addend is None else _rows_of(addend)
    weight, _ = _rows_of(weight)
    device = value.get_device()
    out = _empty(size, operands.result_dtype(), device)
    logit = None
    if logit_dtype is not None:
        logit = _empty([*input.get_size()[:-1], sympy.Integer(1)], logit_dtype, device)

    launch = kernels.launch_config(
        None if batch_invariant else _static(rows),
        h,
        d,
        value.get_dtype().itemsize,
        addend=addend is not None,
    )
    tensors = {
        "input_ptr": input_rows,
        "weight_ptr": weight,
        "bias_ptr": bias,
        "value_ptr": value_rows,
        "addend_ptr": addend_rows,
        "out_ptr": out,
        "logit_ptr": logit,
    }
    kwargs = {name: t for name, t in tensors.items() if t is not None}
    constants: dict[str, Any] = {name: None for name, t in tensors.items() if t is None}
    constants |= {
        "input_stride": input_stride,
        "value_stride": value_stride,
        "addend_stride": addend_stride,
        "out_stride": d,
        "H": h,
        "D": d,
        "BLOCK_H": launch.block_h,
        "BLOCK_D": launch.block_d,
        "UNROLL": max(h, d) <= kernels.UNROLL_LIMIT,
        "PDL": False,  # Inductor's launcher of a user's kernel cannot ask for it
        "WEIGHT_FIRST": False,
        "TRIGGER_FIRST": False,
        "EVICT_FIRST": launch.evict_first,
    }
    # One configuration: Inductor compiles it as it is, without benchmarking.
    kernel = triton.autotune(
        configs=[triton.Config({}, num_warps=launch.num_warps, num_stages=1)], key=[]
    )(kernels.linear_sigmoid_mul_kernel)
    lowerings[triton_kernel_wrapper_mutation](
        kernel_idx=kernel_side_table.add_kernel(kernel),
        constant_args_idx=kernel_side_table.add_constant_args(constants),
        grid=[(rows, sympy.Integer(1), sympy.Integer(1))],
        tma_descriptor_metadata={},
        kwargs=kwargs,
    )
    return out, logit


def _static(size: Any) -> int | None:
    try:
        return int(size)
    except TypeError:
        return None


def _empty(size: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Any:
    out = lowerings[aten.empty.memory_format](list(size), dtype=dtype, device=device)
    out.realize()
    return out


def _rows_of(operand: Any) -> tuple[Any, Any]:
    """The operand in memory with inner stride 1 and rows evenly apart, and the row stride."""
    operand = ir.ExternKernel.realize_input(operand)
    operand.freeze_layout()
    row_stride = _row_stride(operand.get_size(), operand.get_layout().stride)
    if row_stride is None:
        operand = ir.ExternKernel.require_contiguous(operand)
        row_stride = operand.get_size()[-1]
    return operand if isinstance(operand, ir.TensorBox) else ir.TensorBox(operand), row_stride


def _row_stride(size: Sequence[Any], stride: Sequence[Any]) -> Any | None:
    """The one stride that leads from row to row, or None if there is none."""
    equal = V.graph.sizevars.statically_known_equals
    if any(equal(n, 0) for n in size[:-1]):  # nothing is read; Inductor cannot copy it to rows
        return size[-1]
    if not equal(stride[-1], 1):
        return None
    row_stride = expected = None
    for n, s in zip(reversed(size[:-1]), reversed(stride[:-1])):
        if equal(n, 1):
            continue
        if row_stride is None:
            row_stride = s
        elif not equal(s, expected):
            return None
        expected = s * n
    return size[-1] if row_stride is None else row_stride
