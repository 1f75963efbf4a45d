"""The op in Inductor: what becomes of each site (its placement).

``inline``: Inductor's own IR (float32 products, sum over H, sigmoid, product, sum), which the
scheduler fuses with whatever makes the input and uses the result.

``kernel``: a direct launch of the Triton kernel from the generated code, without a dispatcher call.

The rule (:func:`choose_placement`): a site is an island if everything around it is opaque to
Inductor (inputs and outputs of the graph, extern matrix products, collectives, custom ops). On an
island the kernel is faster than the reduction that Inductor generates. Anywhere else inline wins,
because an opaque launch would cut the multiply off from the add, residual and norm that Inductor
fuses with it: at prefill that costs more than the unfused gate. The measurements behind the rule
are the arms ``gatefuse-inline`` and ``gatefuse-kernel`` of the benchmark.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch._inductor import config, ir
from torch._inductor.lowering import (
    broadcast_tensors,
    fallbacks,
    lowerings,
    make_pointwise,
    register_lowering,
)
from torch._inductor.lowering import to_dtype as lower_to_dtype
from torch._inductor.virtualized import V, ops
from torch.fx import Node

from gatefuse import choices, compat, report
from gatefuse.nodes import TRANSPOSES, VIEWS, source_of

__all__ = ["choose_placement", "computed_by_inductor", "register"]

log = logging.getLogger("gatefuse")
aten = torch.ops.aten

_registered = False


def register() -> None:
    """Register the op's lowerings with Inductor; once per process."""
    global _registered
    if _registered:
        return
    register_lowering(torch.ops.gatefuse.linear_sigmoid_mul.default, type_promotion_kind=None)(
        _lower
    )
    register_lowering(
        torch.ops.gatefuse.linear_sigmoid_mul_logit.default, type_promotion_kind=None
    )(_lower_logit)
    _registered = True


def _lower(input: Any, weight: Any, bias: Any, value: Any, addend: Any) -> Any:
    return _place(input, weight, bias, value, addend, None)[0]


def _lower_logit(
    input: Any, weight: Any, bias: Any, value: Any, addend: Any, logit_dtype: torch.dtype
) -> Any:
    return _place(input, weight, bias, value, addend, logit_dtype)


def _place(
    input: Any,
    weight: Any,
    bias: Any,
    value: Any,
    addend: Any,
    logit_dtype: torch.dtype | None,
) -> tuple[Any, Any]:
    node = V.graph.current_node
    # What the pass has written to the node: nothing where a model calls the op by itself, which
    # rounds once, as it does eagerly.
    meta = node.meta.get("gatefuse", {})
    rounding = bool(meta) and (meta["eager_rounding"] or config.emulate_precision_casts)
    problem = _kernel_problem(input, weight, bias, value, addend)
    if problem is None and rounding:
        problem = "the kernel rounds once, and eager rounding was asked for"
    wanted = meta.get("placement", "auto")
    if problem is not None:
        placement = "inline"
        reason = f"kernel was forced, but {problem}" if wanted == "kernel" else problem
    elif wanted == "auto":
        placement, reason = choose_placement(node, input, value, addend)
    else:
        placement, reason = wanted, "forced by option"
    operands = (input, weight, bias, value, addend, logit_dtype)
    result = None
    if placement == "kernel":
        try:
            result = _lower_kernel(*operands)
        except Exception as e:  # whatever it was, it must not break the user's compilation
            log.warning("gatefuse: no kernel for %s, lowered inline instead", node, exc_info=True)
            placement, reason = "inline", f"the kernel failed to lower: {type(e).__name__}: {e}"
    if result is None:
        result = _lower_inline(*operands, rounding, meta)
    if "key" in meta:
        report.note_placement(meta["key"], placement, reason)
    return result


def choose_placement(node: Node, input: Any, value: Any, addend: Any) -> tuple[str, str]:
    """``("inline" | "kernel", why)`` for an op node and the IR of its operands, where both can
    serve."""
    for name, operand in (("input", input), ("value", value), ("addend", addend)):
        if operand is not None and _made_by_inductor(operand):
            return "inline", f"the {name} is made by a kernel of Inductor's"
    user = _fusible_user(node)
    if user is not None:
        return "inline", f"the result goes into {user.target}"
    return "kernel", "all neighbours are opaque to Inductor"


def _kernel_problem(input: Any, weight: Any, bias: Any, value: Any, addend: Any) -> str | None:
    """Why the Triton kernel cannot serve these operands, or None."""
    device = value.get_device()
    if device.type == "cpu":
        return "Inductor's C++ serves the CPU"
    if device.type not in ("cuda", "xpu"):
        return f"the kernel is not written for {device.type}"
    try:
        from gatefuse.kernels import KERNEL_DTYPES
    except ImportError:
        return "Triton is not installed"
    operands = [t for t in (input, weight, bias, value, addend) if t is not None]
    if any(t.get_dtype() not in KERNEL_DTYPES for t in operands):
        return "the kernel does not take these dtypes"
    if _static(input.get_size()[-1]) is None or _static(value.get_size()[-1]) is None:
        return "a width is symbolic, and the kernel is compiled for one width"
    return None


def _static(size: Any) -> int | None:
    try:
        return int(size)
    except TypeError:
        return None


def _made_by_inductor(operand: Any) -> bool:
    """Whether code that Inductor generates computes this operand, so that it can fuse with it."""
    data = operand
    while True:
        if isinstance(data, (ir.TensorBox, ir.StorageBox, ir.BaseView)):
            data = data.data
        else:
            return isinstance(data, (ir.Loops, ir.ComputedBuffer))


_NO_COMPUTATION = (
    VIEWS
    | TRANSPOSES
    | {aten.slice.Tensor, aten.select.int, aten.expand.default, aten.as_strided.default}
)
_EXTERN = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.convolution.default,
    aten._grouped_mm.default,
    aten._scaled_mm.default,
}


def _fusible_user(node: Node) -> Node | None:
    """A user of the result, looking through views, that Inductor generates code for."""
    stack = list(node.users)
    while stack:
        user = stack.pop()
        if user.op == "output":
            continue
        target = user.target
        if not isinstance(target, torch._ops.OpOverload):
            if user.op == "call_function" and getattr(target, "__name__", "") == "getitem":
                stack.extend(user.users)
            continue  # higher-order operators
        if target in _NO_COMPUTATION:
            stack.extend(user.users)
        elif not _is_opaque(target):
            return user
    return None


def computed_by_inductor(node: Node) -> bool:
    """Whether Inductor generates the code that computes ``node``, looking through views."""
    while node.op == "call_function" and node.target in _NO_COMPUTATION:
        node = source_of(node)
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and not _is_opaque(target)


def _is_opaque(target: torch._ops.OpOverload) -> bool:
    """Whether Inductor calls this operator instead of generating code for it."""
    return (
        target in _EXTERN
        or target in fallbacks
        or target not in lowerings
        or target.namespace in ("_c10d_functional", "gatefuse")
        or target is aten.copy_.default  # to an input of the graph
    )


def _round_to(x: Any, dtype: torch.dtype) -> Any:
    """Round float32 values to a dtype below and back; Inductor would drop a plain pair of casts."""
    through_bits = compat.drops_rounding_casts(x.get_device().type)

    def inner(v: Any) -> Any:
        low = ops.to_dtype(v, dtype, src_dtype=torch.float32, use_compute_types=False)
        if through_bits:
            bits = ops.to_dtype_bitcast(low, torch.int16, dtype)
            low = ops.to_dtype_bitcast(bits, dtype, torch.int16)
        return ops.to_dtype(low, torch.float32, src_dtype=dtype, use_compute_types=False)

    return make_pointwise(inner, override_return_dtype=torch.float32)(x)


def _rounded_product(a: Any, b: Any) -> Any:
    """A float32 product that no compiler contracts with a sum behind it to a multiply-add."""

    def inner(x: Any, y: Any) -> Any:
        return ops.mul_rn(x, y)

    return make_pointwise(inner, override_return_dtype=torch.float32)(*broadcast_tensors(a, b))


def _result_dtype(*operands: Any) -> torch.dtype:
    from gatefuse.ops import result_dtype

    dtypes = [None if t is None else t.get_dtype() for t in operands]
    return result_dtype(*dtypes)


def _lower_inline(
    input: Any,
    weight: Any,
    bias: Any,
    value: Any,
    addend: Any,
    logit_dtype: torch.dtype | None,
    rounding: bool,
    meta: dict[str, Any],
) -> tuple[Any, Any]:
    choices.install()
    out_dtype = _result_dtype(input, weight, bias, value, addend)
    wide = torch.promote_types(torch.float32, out_dtype)
    mul, add = lowerings[aten.mul.Tensor], lowerings[aten.add.Tensor]
    row = lowerings[aten.squeeze.dim](weight, 0)

    def rounded(x: Any, name: str) -> Any:
        for dtype in meta["roundings"][name] if rounding else ():
            x = _round_to(x, dtype)
        return x

    product = rounded(mul(lower_to_dtype(input, wide), lower_to_dtype(row, wide)), "product")
    logit = lowerings[aten.sum.dim_IntList](product, [-1], True)
    if bias is not None:
        logit = rounded(logit, "sum")
        logit = add(logit, lower_to_dtype(lowerings[aten.reshape.default](bias, [1]), wide))
    kept = None if logit_dtype is None else lower_to_dtype(logit, logit_dtype)
    gate = rounded(lowerings[aten.sigmoid.default](rounded(logit, "logit")), "gate")
    lead = list(value.get_size()[:-1])
    if list(gate.get_size()[:-1]) != lead:
        gate = lowerings[aten.reshape.default](gate, [*lead, 1])
    out = (_rounded_product if rounding else mul)(gate, lower_to_dtype(value, wide))
    if addend is not None:
        out = add(rounded(out, "gated"), lower_to_dtype(addend, wide))
    return lower_to_dtype(out, out_dtype), kept


def _lower_kernel(
    input: Any,
    weight: Any,
    bias: Any,
    value: Any,
    addend: Any,
    logit_dtype: torch.dtype | None,
) -> tuple[Any, Any]:
    import sympy  # type: ignore[import-untyped]
    import triton
    from torch._higher_order_ops.triton_kernel_wrap import (
        kernel_side_table,
        triton_kernel_wrapper_mutation,
    )

    from gatefuse import kernels

    size = list(value.get_size())
    h, d = int(input.get_size()[-1]), int(size[-1])
    rows = sympy.prod(size[:-1]) if size[:-1] else sympy.Integer(1)
    input_rows, input_stride = _rows_of(input)
    value_rows, value_stride = _rows_of(value)
    addend_rows, addend_stride = (None, 0) if addend is None else _rows_of(addend)
    weight, _ = _rows_of(weight)
    device = value.get_device()
    out = _empty(size, _result_dtype(input, weight, bias, value, addend), device)
    logit = None
    if logit_dtype is not None:
        logit = _empty([*input.get_size()[:-1], sympy.Integer(1)], logit_dtype, device)

    launch = kernels.launch_config(
        _static(rows), h, d, value.get_dtype().itemsize, addend=addend is not None
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
