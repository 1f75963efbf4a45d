"""The op in Inductor: what becomes of each site (its placement).

``inline``: Inductor's own IR (float32 products, sum over H, sigmoid, product, sum), which the
scheduler fuses with whatever makes the input and uses the result.

``kernel``: a direct launch of the Triton kernel; :mod:`gatefuse.inductor.kernel_call`.

:mod:`gatefuse.inductor.cost_model` chooses.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch._inductor import config
from torch._inductor.lowering import (
    broadcast_tensors,
    lowerings,
    make_pointwise,
    register_lowering,
)
from torch._inductor.lowering import to_dtype as lower_to_dtype
from torch._inductor.virtualized import V, ops

from gatefuse import compat, recording
from gatefuse.inductor import choices
from gatefuse.inductor.cost_model import choose_placement
from gatefuse.inductor.kernel_call import kernel_problem, lower_kernel
from gatefuse.inductor.rewriter import META_KEY
from gatefuse.operands import Operands

__all__ = ["register"]

log = logging.getLogger("gatefuse")
aten = torch.ops.aten

_registered = False


def register() -> None:
    """Register the op's lowerings with Inductor; once per process."""
    global _registered
    if _registered:
        return
    _registered = True
    library = torch.ops.gatefuse
    for op, lower in (
        (library.linear_sigmoid_mul.default, _lower),
        (library.linear_sigmoid_mul_logit.default, _lower_logit),
    ):
        register_lowering(op, type_promotion_kind=None)(lower)


def _lower(input: Any, weight: Any, value: Any, bias: Any = None, addend: Any = None) -> Any:
    return _place(Operands(input, weight, value, bias, addend), None)[0]


def _lower_logit(
    input: Any,
    weight: Any,
    value: Any,
    bias: Any = None,
    addend: Any = None,
    *,
    logit_dtype: torch.dtype,
) -> Any:
    return _place(Operands(input, weight, value, bias, addend), logit_dtype)


def _place(operands: Operands, logit_dtype: torch.dtype | None) -> tuple[Any, Any]:
    node = V.graph.current_node
    # What the pass has written to the node: nothing where a model calls the op by itself, which
    # rounds once, as it does eagerly.
    meta = node.meta.get(META_KEY, {})
    rounding = bool(meta) and (meta["eager_rounding"] or config.emulate_precision_casts)
    problem = kernel_problem(operands)
    if problem is None and rounding:
        problem = "the kernel rounds once, and eager rounding was asked for"
    placement, reason = choose_placement(
        node,
        input=operands.input,
        value=operands.value,
        addend=operands.addend,
        wanted=meta.get("placement", "auto"),
        kernel_problem=problem,
    )
    result = None
    if placement == "kernel":
        try:
            invariant = meta.get("batch_invariant", False) or compat.batch_invariant()
            result = lower_kernel(operands, logit_dtype, batch_invariant=invariant)
        except Exception as e:  # whatever it was, it must not break the user's compilation
            log.warning("gatefuse: no kernel for %s, lowered inline instead", node, exc_info=True)
            placement, reason = "inline", f"the kernel failed to lower: {type(e).__name__}: {e}"
    if result is None:
        choices.install()
        result = _lower_inline(operands, logit_dtype, meta["roundings"] if rounding else None)
    if "key" in meta:
        recording.note_placement(meta["key"], placement, reason)
    return result


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


def _lower_inline(
    operands: Operands,
    logit_dtype: torch.dtype | None,
    roundings: dict[str, tuple[torch.dtype, ...]] | None,
) -> tuple[Any, Any]:
    """roundings: what eager rounds each intermediate value to, or None to round once."""
    input, weight, value, bias, addend = operands
    for x in (input, value):
        # Inductor computes anew what one node reads, however often; of a chain of gates, each of
        # them twice as often as the next.
        if (uses := sum(x is y for y in operands)) > 1:
            x.mark_reuse(uses)
    out_dtype = operands.result_dtype()
    wide = torch.promote_types(torch.float32, out_dtype)
    mul, add = lowerings[aten.mul.Tensor], lowerings[aten.add.Tensor]
    row = lowerings[aten.squeeze.dim](weight, 0)

    def rounded(x: Any, name: str) -> Any:
        for dtype in () if roundings is None else roundings[name]:
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
    multiply = mul if roundings is None else _rounded_product
    out = multiply(gate, lower_to_dtype(value, wide))
    if addend is not None:
        out = add(rounded(out, "gated"), lower_to_dtype(addend, wide))
    return lower_to_dtype(out, out_dtype), kept
