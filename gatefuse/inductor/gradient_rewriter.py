"""Writes a gate's gradients in the form that is fastest, where the cost model says which.

The input's gradient, a matrix product of ``[N, 1]`` and ``[1, H]``, becomes an elementwise product,
which Inductor fuses with what uses it; the weight's, where it is a reduction over rows, becomes a
matrix product, which the library does without a slow kernel around it. Results keep their dtypes,
shapes and strides; a gradient of which that cannot be shown stays as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from gatefuse.inductor.cost_model import reason_to_keep_gradients, reason_to_keep_sum
from gatefuse.inductor.fx_utils import arguments, known, tensor_of
from gatefuse.inductor.match_backward import Gradients, WeightSum, find_gradients
from gatefuse.inductor.node_order import Order
from gatefuse.inductor.rewriter import check_same, erase_unused, insert_call
from gatefuse.origin import origin_of
from gatefuse.records import GradientReport
from gatefuse.settings import Options

__all__ = ["rewrite_gradients"]

aten = torch.ops.aten
prims = torch.ops.prims


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
        rewriter = _Rewriter(graph, order)
        if reason is None:
            rewriter.rewrite(gradients, options)
        reports.append(_report(gradients, rewriter, reason or rewriter.reason))
    return reports


class _Rewriter:
    """products, sums: how many gradients of each kind were rewritten; reason: why not all."""

    def __init__(self, graph: Graph, order: Order) -> None:
        self.graph = graph
        self.order = order
        self.products = self.sums = 0
        self.reason = ""

    def rewrite(self, gradients: Gradients, options: Options) -> None:
        for product in gradients.input_products:
            self.products += self._replace(product, product, self._elementwise)
        for found in gradients.weight_sums:
            reason = reason_to_keep_sum(found, options)
            if reason is None and self.order.writes_between(found.product, found.result):
                reason = "memory is written in between"
            if reason is None:
                self.sums += self._replace(found.result, found.product, self._by_library, found)
            else:
                self.reason = reason

    def _replace(self, old: Node, before: Node, make: Any, *args: Any) -> bool:
        """Put what ``make`` inserts before a node in the place of ``old``; on an error it stays."""
        last = before.prev
        try:
            with self.graph.inserting_before(before):
                new = make(old, *args)
            check_same(new.meta["val"], old.meta["val"])
        except Exception as e:
            self.reason = str(e)
            while before.prev is not last:
                self.graph.erase_node(before.prev)
            return False
        old.replace_all_uses_with(new)
        erase_unused(self.graph, [old])
        return True

    def _call(self, like: Node, target: Any, *args: Any) -> Node:
        return insert_call(self.graph, like, target, *args)

    def _elementwise(self, old: Node) -> Node:
        """``mm`` or ``addmm`` of a column and a row as products of elements."""
        if old.target is aten.mm.default:
            left, right = arguments(old)[:2]
            return self._call(old, aten.mul.Tensor, left, right)
        added, left, right, beta, alpha = arguments(old)
        if beta != 1 or alpha != 1:
            raise ValueError("the product is scaled")
        return self._call(
            old, aten.add.Tensor, self._call(old, aten.mul.Tensor, left, right), added
        )

    def _by_library(self, old: Node, found: WeightSum) -> Node:
        """A sum over rows as a matrix product of a row and a matrix."""
        rows, column = found.input, found.grad_logit
        value = tensor_of(rows, "the input")
        if value.dim() != 2:
            rows = self._call(old, aten.reshape.default, rows, [-1, value.shape[-1]])
        number = tensor_of(rows, "the input").shape[0]
        shape = tensor_of(column, "the logit's gradient").shape
        if len(shape) == 2 and known(shape[1] == 1):
            column = self._call(old, aten.permute.default, column, [1, 0])
        elif len(shape) != 2 or not known(shape[0] == 1) or not known(shape[1] == number):
            column = self._call(old, aten.reshape.default, column, [1, -1])
        new = self._call(old, aten.mm.default, column, rows)
        if tensor_of(old, "the gradient").dim() != 2:
            new = self._call(old, aten.reshape.default, new, [value.shape[-1]])
        return new


def _report(gradients: Gradients, rewriter: _Rewriter, reason: str) -> GradientReport:
    if rewriter.products:
        input: str | None = "an elementwise product, which Inductor fuses"
    elif gradients.input_products:
        input = "a matrix product"
    else:
        input = "elementwise" if gradients.elementwise else None
    if gradients.weight_products or rewriter.sums:
        weight: str | None = "a matrix product" + (", which was a sum" if rewriter.sums else "")
    else:
        weight = "a sum over rows" if gradients.weight_sums else None
    origin = origin_of(gradients.grad_logit)
    return GradientReport(
        node=gradients.grad_logit.name,
        location=origin.location,
        line=origin.line,
        layer=origin.layer,
        input=input,
        weight=weight,
        rewritten=rewriter.products + rewriter.sums,
        reason=reason,
    )
