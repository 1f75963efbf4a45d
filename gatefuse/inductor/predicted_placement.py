"""What becomes of a fused gate, told from the graph: the rule of the lowering, without one."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch._inductor import config
from torch.fx import Node

from gatefuse.inductor.cost_model import NO_COMPUTATION, choose_placement, is_opaque
from gatefuse.inductor.fx_utils import val_of
from gatefuse.inductor.kernel_call import problem_of
from gatefuse.inductor.rewriter import META_KEY
from gatefuse.operands import Operands

__all__ = ["predict"]

aten = torch.ops.aten
prims = torch.ops.prims

_SPLITS = {aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int}
_CALLED_BY_ITS_LOWERING = {aten.topk.default}
_SAME_OR_COPY = {aten._to_copy.default, prims.device_put.default}


def predict(node: Node) -> tuple[str, str]:
    """``("inline" | "kernel", why)`` for an op node that the pass has made; on a GPU, with Triton
    at hand there."""
    operands = Operands(*node.args)
    meta = node.meta[META_KEY]
    tensors = [t for t in map(val_of, operands.present()) if t is not None]
    widths = (val_of(operands.input), val_of(operands.value))
    problem = problem_of(
        tensors[0].device.type,
        [t.dtype for t in tensors],
        all(t is not None and isinstance(t.shape[-1], int) for t in widths),
    )
    if problem is None and (meta["eager_rounding"] or config.emulate_precision_casts):
        problem = "the kernel rounds once, and eager rounding was asked for"
    return choose_placement(
        node,
        input=operands.input,
        value=operands.value,
        addend=operands.addend,
        wanted=meta["placement"],
        kernel_problem=problem,
        made_by_inductor=_made_by_inductor,
    )


def _made_by_inductor(node: Any) -> bool:
    """Whether code that Inductor generates will compute the node."""
    while isinstance(node, Node):
        target = node.target
        source = next(iter(node.all_input_nodes), None)
        if target is operator.getitem and source is not None and source.target not in _SPLITS:
            target = source.target  # one of several results
        elif target is operator.getitem or target in NO_COMPUTATION or target in _SPLITS:
            node = source
            continue
        if not isinstance(target, torch._ops.OpOverload):
            return False
        if target in _SAME_OR_COPY and source is not None:
            before, after = val_of(source), val_of(node)
            if before is not None and after is not None and before.device != after.device:
                return False
        if target in _CALLED_BY_ITS_LOWERING:
            return False
        if target is aten.cat.default:
            return all(map(_is_copied, node.all_input_nodes))
        # The result of another fused gate is memory that Inductor has laid out.
        return target.namespace == "gatefuse" or not is_opaque(target)
    return False


def _is_copied(part: Node) -> bool:
    """Whether a kernel copies this part of a concatenation; else its producer writes it where it
    belongs, and there is no such kernel."""
    if part.op == "placeholder":
        return True
    return _made_by_inductor(part) and len(part.users) == 1
