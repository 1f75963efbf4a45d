"""Finds the gradients of a gate in a functional ATen graph; changes nothing.

With ``s = sigmoid(z)``, a gate's derivative is ``dz = s (1 - s) sum(grad * value)``, one number per
row; ``dz * weight`` is the input's gradient, ``sum(dz * input)`` the weight's. That both ``s`` and
the sum over a row are there tells a gate's derivative from those of other sigmoids.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from gatefuse.inductor.fx_utils import (
    TRANSPOSES,
    arguments,
    is_float_conversion,
    is_neutral,
    is_shape_op,
    known,
    source_of,
    tensor_of,
    val_of,
    widens,
)

__all__ = ["Gradients", "WeightSum", "find_gradients"]

aten = torch.ops.aten


@dataclass(frozen=True)
class WeightSum:
    """The weight's gradient as a reduction over rows: ``result``, of shape ``[1, H]`` or ``[H]``,
    is ``sum(product)`` rounded to its dtype, and ``product`` is grad_logit, one per row, times
    input, both wider than they are."""

    product: Node
    result: Node
    grad_logit: Node
    input: Node


@dataclass(frozen=True)
class Gradients:
    """The gradients of one gate that a graph computes.

    grad_logit: the logit's gradient. input_products: the input's gradient as
    ``mm`` or ``addmm`` of ``[N, 1]`` and ``[1, H]``. weight_products: the weight's as ``mm`` of
    ``[1, N]`` and ``[N, H]``. weight_sums: the same as reductions. elementwise: whether the input's
    gradient is a product already, or one of several sums, that Inductor can fuse.
    """

    grad_logit: Node
    input_products: tuple[Node, ...]
    weight_products: tuple[Node, ...]
    weight_sums: tuple[WeightSum, ...]
    elementwise: bool


def find_gradients(graph: Graph) -> list[Gradients]:
    """The gradients of each gate in the graph, whose nodes carry ``meta["val"]``."""
    found = dict[Node, Gradients]()
    for target in (aten.sub.Tensor, aten.rsub.Scalar):
        for node in graph.find_nodes(op="call_function", target=target):
            # A node nobody foresaw leaves this gate alone.
            with contextlib.suppress(Exception):
                for grad_logit in _grad_logits(node):
                    found[grad_logit] = _gradients(grad_logit)
    return list(found.values())


def _through(node: Node) -> Iterator[Node]:
    """The node, and what has the same elements in the same order, of another shape or float type;
    of one element per row also transposed."""
    seen, stack = {node}, [node]
    while stack:
        current = stack.pop()
        yield current
        for user in current.users:
            if user not in seen and (is_neutral(user) or user.target in TRANSPOSES):
                seen.add(user)
                stack.append(user)


def _grad_logits(complement: Node) -> Iterator[Node]:
    """Of ``1 - s`` the nodes ``sum(grad * value) * (s * (1 - s))``, their factors in any order."""
    if complement.target is aten.sub.Tensor:
        one, gate, scale = arguments(complement)
    else:
        gate, one, scale = arguments(complement)
    if one != 1 or scale != 1:
        return
    while is_neutral(gate):
        gate = source_of(gate)
    same = list(_through(gate))
    for derivative in complement.users:
        if derivative.target is not aten.mul.Tensor:
            continue
        if not any(n in same for n in derivative.all_input_nodes):
            continue
        for node in _through(derivative):
            for product in node.users:
                if product.target is aten.mul.Tensor and any(
                    _is_row_sum(n) for n in product.all_input_nodes if n is not node
                ):
                    yield product


def _is_row_sum(node: Node) -> bool:
    """A sum of products over the last dimension, perhaps converted and reshaped."""
    while is_neutral(node):
        node = source_of(node)
    if node.target is not aten.sum.dim_IntList:
        return False
    product, dims = arguments(node)[:2]
    last = tensor_of(product, "the product").dim() - 1
    if not dims or len(dims) != 1 or dims[0] not in (-1, last):
        return False
    while is_float_conversion(product):
        product = source_of(product)
    return product.target is aten.mul.Tensor and len(product.all_input_nodes) == 2


def _gradients(grad_logit: Node) -> Gradients:
    rows = tensor_of(grad_logit, "the logit's gradient").numel()
    input_products, weight_products = list[Node](), list[Node]()
    weight_sums, elementwise = list[WeightSum](), False
    for node in _through(grad_logit):
        shape = tensor_of(node, "the logit's gradient").shape
        for user in node.users:
            if user.target in (aten.mm.default, aten.addmm.default):
                if arguments(user)[0 if user.target is aten.mm.default else 1] is not node:
                    continue
                if known(shape[1] == 1):
                    input_products.append(user)
                elif known(shape[0] == 1) and user.target is aten.mm.default:
                    weight_products.append(user)
            elif user.target is aten.mul.Tensor:
                found = _weight_sum(user, node, rows)
                if found is not None:
                    weight_sums.append(found)
                else:
                    elementwise = True
    return Gradients(
        grad_logit,
        tuple(input_products),
        tuple(weight_products),
        tuple(weight_sums),
        elementwise,
    )


def _weight_sum(product: Node, grad_logit: Node, rows: int | torch.SymInt) -> WeightSum | None:
    """What ``product`` of ``grad_logit`` is, if it is summed over rows only, or None."""
    (other,) = [n for n in product.all_input_nodes if n is not grad_logit]
    value = tensor_of(product, "the product")
    width = value.shape[-1]
    if len(product.users) != 1 or known(rows == 1) or not known(value.numel() == rows * width):
        return None
    (total,) = product.users
    if total.target is not aten.sum.dim_IntList:
        return None
    dims = arguments(total)[1]
    summed = tensor_of(total, "the sum").numel()
    if (
        not dims
        or not known(summed == width)
        or (value.dim() - 1) in [d % value.dim() for d in dims]
    ):
        return None
    input = _wide_source(other)
    val = val_of(input)
    if val is None or not (known(val.shape[-1] == width) and known(val.numel() == value.numel())):
        return None
    result = total
    while len(result.users) == 1 and is_float_conversion(user := next(iter(result.users))):
        result = user
    return WeightSum(product, result, _wide_source(grad_logit), input)


def _wide_source(node: Node) -> Node:
    """What a node is before it was reshaped and made wider."""
    while widens(node) or is_shape_op(node):
        node = source_of(node)
    return node
