"""Writes the gradient of a gate's input in the form that Inductor can fuse.

A matrix product of ``[N, 1]`` and ``[1, H]`` becomes an elementwise product. Results keep their
dtypes, shapes and strides; a gradient of which that cannot be shown stays as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.fx import Graph, Node

from gatefuse.inductor.cost_model import reason_to_keep_gradients
from gatefuse.inductor.fx_utils import arguments, known, tensor_of
from gatefuse.inductor.match_backward import Gradients, find_gradients, products_of
from gatefuse.inductor.node_order import Order
from gatefuse.inductor.rewriter import check_same, erase_unused, insert_call
from gatefuse.origin import origin_of
from gatefuse.records import GradientReport
from gatefuse.settings import Options

__all__ = ["rewrite_gradients"]

aten = torch.ops.aten


def rewrite_gradients(graph: Graph, options: Options) -> list[GradientReport]:
    """Rewrite the gradients of the graph's gates in place; tells what became of each gate's."""
    found = find_gradients(graph)
    order = Order(graph) if found else None
    reports = []
    for gradients in found:
        assert order is not None
        reason = reason_to_keep_gradients(gradients, options)
        if reason is None and order.draws() > 1:
            reason = (
                "random numbers are drawn more than once in this graph, in an order that counts"
            )
        rewritten = 0
        for product in gradients.input_products if reason is None else ():
            try:
                if not product._erased:  # with another gate's gradient in it
                    _make_elementwise(graph, product)
                rewritten += 1
            except Exception as e:
                reason = str(e)
        reports.append(_report(gradients, rewritten, reason or ""))
    return reports


def _make_elementwise(graph: Graph, old: Node) -> None:
    """Rewrite ``mm``, ``addmm`` or ``mm_plus_mm`` with a column and a row among its operands; on an
    error the graph stays as it was."""
    last = old.prev
    try:
        with graph.inserting_before(old):
            new = _elementwise(functools.partial(insert_call, graph, old), old)
        check_same(new.meta["val"], old.meta["val"])
    except Exception:
        while old.prev is not last:
            graph.erase_node(old.prev)
        raise
    old.replace_all_uses_with(new)
    erase_unused(graph, [old])


def _elementwise(call: Callable[..., Node], old: Node) -> Node:
    parts = [
        call(aten.mul.Tensor if known(_columns(left) == 1) else aten.mm.default, left, right)
        for left, right in products_of(old)
    ]
    if old.target is aten.addmm.default:
        added, *_, beta, alpha = arguments(old)
        if beta != 1 or alpha != 1:
            raise ValueError("the product is scaled")
        parts.append(added)
    return functools.reduce(functools.partial(call, aten.add.Tensor), parts)


def _columns(node: Node) -> int | torch.SymInt:
    return tensor_of(node, "a factor").shape[1]


def _report(gradients: Gradients, rewritten: int, reason: str) -> GradientReport:
    elementwise = "elementwise" if gradients.elementwise else None
    by_library = "a matrix product"
    if rewritten:
        input: str | None = "an elementwise product, which Inductor fuses"
    else:
        input = by_library if gradients.input_products else elementwise
    origin = origin_of(gradients.grad_logit)
    return GradientReport(
        node=gradients.grad_logit.name,
        location=origin.location,
        line=origin.line,
        layer=origin.layer,
        input=input,
        weight=by_library if gradients.weight_products else elementwise,
        rewritten=rewritten,
        reason=reason,
    )
