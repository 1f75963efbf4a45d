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
    arguments,
    is_float_conversion,
    is_neutral,
    known,
    source_of,
    tensor_of,
)

__all__ = ["Gradients", "find_gradients", "gradients_of", "product_of", "through"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Gradients:
    """The gradients of one gate that a graph computes.

    grad_logit: the logit's gradient. input_products: the input's gradient as ``mm`` or ``addmm`` of
    ``[N, 1]`` and ``[1, H]``, which Inductor may have padded.
    weight_products: the weight's as ``mm`` of ``[1, N]`` and ``[N, H]``. elementwise: products
    of elements, which may be either.
    """

    grad_logit: Node
    input_products: tuple[Node, ...]
    weight_products: tuple[Node, ...]
    elementwise: tuple[Node, ...]


def find_gradients(graph: Graph) -> list[Gradients]:
    """The gradients of each gate in the graph, whose nodes carry ``meta["val"]``."""
    found = dict[Node, Gradients]()
    for target in (aten.sub.Tensor, aten.rsub.Scalar):
        for node in graph.find_nodes(op="call_function", target=target):
            # A node nobody foresaw leaves this gate alone.
            with contextlib.suppress(Exception):
                for grad_logit in _grad_logits(node):
                    found[grad_logit] = gradients_of(grad_logit)
    return list(found.values())


def through(node: Node) -> Iterator[Node]:
    """The node, and what has its elements in their order, of another shape or float type."""
    stack = [node]
    while stack:
        current = stack.pop()
        yield current
        stack.extend(user for user in current.users if is_neutral(user))


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
    same = list(through(gate))
    for derivative in complement.users:
        if derivative.target is not aten.mul.Tensor:
            continue
        if not any(n in same for n in derivative.all_input_nodes):
            continue
        for node in through(derivative):
            for product in node.users:
                if product.target is aten.mul.Tensor and any(
                    map(_is_row_sum, product.all_input_nodes)
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
    if list(dims or ()) not in ([-1], [last]):
        return False
    while is_float_conversion(product):
        product = source_of(product)
    return product.target is aten.mul.Tensor and len(product.all_input_nodes) == 2


def gradients_of(grad_logit: Node) -> Gradients:
    """The gradients that are computed of a logit's."""
    input_products, weight_products, elementwise = list[Node](), list[Node](), list[Node]()
    for node in through(grad_logit):
        shape = tensor_of(node, "the logit's gradient").shape
        padded = [user for user in node.users if user.target is aten.constant_pad_nd.default]
        for left in (node, *padded):
            elementwise += [user for user in left.users if user.target is aten.mul.Tensor]
            products = [n for n in left.users if (f := product_of(n)) and f[0] is left]
            if not products:  # the logit may have one dimension
                continue
            if known(shape[1] == 1):
                input_products += products
            elif known(shape[0] == 1):
                weight_products += products
    return Gradients(grad_logit, tuple(input_products), tuple(weight_products), tuple(elementwise))


def product_of(node: Node) -> tuple[Node, Node] | None:
    """The operands of the matrix product that a node is, or None."""
    if node.target in (aten.mm.default, aten.addmm.default):
        left, right = arguments(node)[0 if node.target is aten.mm.default else 1 :][:2]
        return left, right
    return None
