"""Is a site worth fusing, and as what? The pass and the lowering both ask here.

A site is an island if everything around it is opaque to Inductor (inputs and outputs of the graph,
extern matrix products, collectives, custom ops). On an island the Triton kernel is faster than the
reduction that Inductor generates. Anywhere else inline wins, because an opaque launch would cut the
multiply off from the add, residual and norm that Inductor fuses with it: at prefill that costs more
than the unfused gate. The measurements behind the rule are the providers ``gatefuse-inline`` and
``gatefuse-kernel`` of the benchmarks.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch._inductor import config, ir
from torch._inductor.lowering import fallbacks, lowerings
from torch.fx import Node

from gatefuse import compat
from gatefuse.inductor.fx_utils import TRANSPOSES, VIEWS, known, source_of, tensor_of
from gatefuse.inductor.match_backward import Gradients
from gatefuse.inductor.match_gate import Site
from gatefuse.settings import Options

__all__ = [
    "NO_COMPUTATION",
    "choose_placement",
    "is_opaque",
    "reason_not_to_fuse",
    "reason_to_keep_gradients",
]

aten = torch.ops.aten

LARGE_RESULT = {2: 8 << 20, 4: 1 << 20}
"""Bytes of a result on the CPU, by those of an element, from which on a gate between other
generated code is not faster fused. 16-bit products of the gate's shape are slow unfused."""

NO_COMPUTATION = (
    VIEWS
    | TRANSPOSES
    | {aten.slice.Tensor, aten.select.int, aten.expand.default, aten.as_strided.default}
)
"""Operators that only look at memory in another way."""
_EXTERN = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.convolution.default,
    aten._grouped_mm.default,
    aten._scaled_mm.default,
}


def reason_not_to_fuse(site: Site, options: Options) -> str | None:
    """Why a site is better left to Inductor, or None if fusing it pays.

    On a GPU, code for any width can neither keep a row in registers nor rely on aligned rows. In a
    decoder layer's glue on an H200 (H = 4096) it took 21 to 32 % less time than the unfused one at
    up to 256 rows and 4 to 27 % more from 1024 rows on, and one compile serves all.

    On the CPU the fused gate makes one kernel of those before and after it. It passes over all
    rows for each step, where the kernels by themselves finish a row while it is in the cache, and
    cannot use the memory of its input for its result: up to 10 % slower, and 20 to 30 % where the
    memory is fresh (32 MiB).
    """
    rounding = options.eager_rounding or config.emulate_precision_casts
    if rounding and site.sigmoid.target is not aten.sigmoid.default:
        return "eager's rounding is known of a gate that is written as a sigmoid only"
    if options.placement != "auto":
        return None
    x, v = site.input.meta["val"], site.value.meta["val"]
    if v.device.type != "cpu":
        static = isinstance(x.shape[-1], int) and isinstance(v.shape[-1], int)
        reason = "a width is symbolic, and fusing would be slower at many rows"
        return None if static else f"{reason}; a forced placement fuses it"
    if options.batch_invariant or compat.batch_invariant():
        return None  # which the number of rows must not decide
    size = v.numel() * v.element_size()
    if known(size >= LARGE_RESULT[v.element_size()]) and _computed_by_inductor(site.input):
        reason = "with a result of this size on the CPU, fusing would be slower"
        return f"{reason}; a forced placement fuses it"
    return None


def reason_to_keep_gradients(gradients: Gradients, options: Options) -> str | None:
    """Why the gradients of a gate are better left to Inductor, or None.

    On a GPU the input's gradient as a matrix product is written once and read again by whatever
    uses it, and its kernel is one of the library's slowest: in a decoder layer's glue on an H200
    (H = 2048, 16384 rows) 56 of 508 us. The weight's gradient stays the matrix product that it is:
    as a sum over rows it took 22 us by itself as well, and 85 in one kernel with the others' sums.
    Where Inductor tunes, that sum is in the graph; it then joins the kernel of the input's gradient
    if that is one of products of elements, which took longer and more memory.
    """
    if options.eager_rounding or config.emulate_precision_casts:
        return "eager rounding was asked for"
    if tensor_of(gradients.grad_logit, "the gradient").device.type == "cpu":
        return "on the CPU Inductor's own are not slower"
    if config.coordinate_descent_tuning or config.max_autotune or config.max_autotune_gemm:
        return "where Inductor tunes, its own are not slower"
    return None


def _made_by_inductor(operand: Any) -> bool:
    """Whether code that Inductor generates computes this operand and can fuse with the gate."""
    data = operand
    while isinstance(data, (ir.TensorBox, ir.StorageBox, ir.BaseView)):
        data = data.data
    return isinstance(data, (ir.Loops, ir.ComputedBuffer))


def choose_placement(
    node: Node,
    *,
    input: Any,
    value: Any,
    addend: Any,
    wanted: str,
    kernel_problem: str | None,
    made_by_inductor: Callable[[Any], bool] = _made_by_inductor,
) -> tuple[str, str]:
    """``("inline" | "kernel", why)`` for an op node and the IR of its operands.

    wanted: the placement asked for; kernel_problem: why the Triton kernel cannot serve, or None.
    made_by_inductor: whether generated code computes an operand, if the operands are not IR.
    """
    if kernel_problem is not None:
        forced = f"kernel was forced, but {kernel_problem}"
        return "inline", forced if wanted == "kernel" else kernel_problem
    if wanted != "auto":
        return wanted, "forced by option"
    for name, operand in (("input", input), ("value", value), ("addend", addend)):
        if made_by_inductor(operand):
            return "inline", f"the {name} is made by a kernel of Inductor's"
    user = _fusible_user(node)
    if user is not None:
        return "inline", f"the result goes into {user.target}"
    return "kernel", "all neighbours are opaque to Inductor"


def _computed_by_inductor(node: Node) -> bool:
    """The same of a node of the graph, before it is lowered."""
    while node.target in NO_COMPUTATION:
        node = source_of(node)
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and not is_opaque(target)


def _fusible_user(node: Node) -> Node | None:
    """A user of the result, looking through views, that Inductor generates code for."""
    stack = list(node.users)
    while stack:
        user = stack.pop()
        target = user.target
        if not isinstance(target, torch._ops.OpOverload):
            if target is operator.getitem:
                stack.extend(user.users)
            continue  # higher-order operators, the output
        if target in NO_COMPUTATION:
            stack.extend(user.users)
        elif not is_opaque(target):
            return user
    return None


def is_opaque(target: torch._ops.OpOverload) -> bool:
    """Whether Inductor calls this operator instead of generating code for it."""
    return (
        target in _EXTERN
        or target in fallbacks
        or target not in lowerings
        or target.namespace in ("_c10d_functional", "gatefuse")
        or target is aten.copy_.default  # to an input of the graph
    )
