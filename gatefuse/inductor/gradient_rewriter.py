"""Writes the gradient of a gate's input in the form that Inductor can fuse.

A matrix product of ``[N, 1]`` and ``[1, H]`` becomes an elementwise product; generated code, not
the library, adds it to another matrix product. Results keep their dtypes, shapes and strides; a
gradient of which that cannot be shown stays as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.fx import Graph, Node

from gatefuse.inductor import choices
from gatefuse.inductor.choices import GRADIENT_KEY
from gatefuse.inductor.cost_model import reason_to_keep_gradients
from gatefuse.inductor.fx_utils import arguments, known
from gatefuse.inductor.match_backward import (
    Gradients,
    find_gradients,
    gradients_of,
    product_of,
    through,
)
from gatefuse.inductor.node_order import Order
from gatefuse.inductor.rewriter import DifferentResult, check_same, erase_unused, insert_call
from gatefuse.origin import origin_of
from gatefuse.records import GradientReport
from gatefuse.settings import Options

__all__ = ["rewrite_gradients"]

aten = torch.ops.aten


def rewrite_gradients(graph: Graph, options: Options) -> list[GradientReport]:
    """Rewrite the gradients of the graph's gates in place; tells what became of each gate's."""
    order = Order(graph)
    reports = []
    for gradients in find_gradients(graph):
        reason = reason_to_keep_gradients(gradients, options)
        if reason is None and order.draws() > 1:
            reason = "random numbers are drawn more than once in this graph"
        rewritten = 0
        try:
            # Read again: what was done for another gate may have replaced a product of this one's.
            products = gradients_of(gradients.grad_logit).input_products
            for product in products if reason is None else ():
                _replace(graph, product, _elementwise)
                rewritten += 1
            products = gradients_of(gradients.grad_logit).elementwise
            for product in products if reason is None else ():
                product.meta[GRADIENT_KEY] = True
                choices.install()
                for added in _sums_with_matrix_products(product):
                    _replace(graph, added, _apart)
                    rewritten += 1
        except (DifferentResult, ValueError) as e:
            reason = str(e)
        except Exception as e:
            reason = f"could not be rewritten: {type(e).__name__}: {e}"
        reports.append(_report(gradients, rewritten, reason or ""))
    return reports


def _replace(graph: Graph, old: Node, make: Callable[[Callable[..., Node], Node], Node]) -> None:
    """Put what ``make`` inserts in the place of a node; on an error the graph stays as it was."""
    last = old.prev
    try:
        with graph.inserting_before(old):
            new = make(functools.partial(insert_call, graph, old), old)
        check_same(new.meta["val"], old.meta["val"])
    except Exception:
        while old.prev is not last:
            graph.erase_node(old.prev)
        raise
    old.replace_all_uses_with(new)
    erase_unused(graph, [old])


def _elementwise(call: Callable[..., Node], old: Node) -> Node:
    """``mm`` or ``addmm`` of a column and a row."""
    factors = product_of(old)
    assert factors is not None
    if not known(factors[0].meta["val"].shape[1] == 1):
        raise ValueError("the product is padded")
    if old.target is aten.mm.default:
        return call(aten.mul.Tensor, *factors)
    added, *_, beta, alpha = arguments(old)
    if beta != 1 or alpha != 1:
        raise ValueError("the product is scaled")
    return call(aten.add.Tensor, call(aten.mul.Tensor, *factors), added)


def _sums_with_matrix_products(product: Node) -> list[Node]:
    """Each ``addmm`` that adds ``product``, from memory, to a matrix product."""
    return [
        user
        for node in through(product)
        for user in node.users
        if user.target is aten.addmm.default
        and arguments(user)[0] is node
        and arguments(user)[3:] == (1, 1)
    ]


def _apart(call: Callable[..., Node], old: Node) -> Node:
    """An ``addmm`` as a matrix product and a sum."""
    added, left, right, *_ = arguments(old)
    return call(aten.add.Tensor, call(aten.mm.default, left, right), added)


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
