"""Finds the sigmoids of a graph, written as such or out of other functions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from gatefuse.inductor.fx_utils import arguments

__all__ = ["Sigmoid", "find_sigmoids"]

aten = torch.ops.aten


class Sigmoid(NamedTuple):
    """gate: the node whose value is ``sigmoid(source)``; inside: the nodes between the two, the one
    next to the gate first."""

    gate: Node
    source: Node
    inside: tuple[Node, ...] = ()


def find_sigmoids(graph: Graph) -> Iterator[Sigmoid]:
    """``sigmoid(z)``, ``1 / (1 + exp(-z))`` and ``0.5 * tanh(z / 2) + 0.5``, each kind in graph
    order."""
    for node in graph.find_nodes(op="call_function", target=aten.sigmoid.default):
        yield Sigmoid(node, arguments(node)[0])
    for node in graph.find_nodes(op="call_function", target=aten.reciprocal.default):
        if (
            (add := _call(arguments(node)[0], aten.add.Tensor))
            and arguments(add)[1:] == (1, 1)
            and (exp := _call(arguments(add)[0], aten.exp.default))
            and (neg := _call(arguments(exp)[0], aten.neg.default))
        ):
            yield Sigmoid(node, arguments(neg)[0], (add, exp, neg))
    for tanh in graph.find_nodes(op="call_function", target=aten.tanh.default):
        halved = arguments(tanh)[0]
        source = _scaled(halved, 0.5)
        for mul in tanh.users:
            if source is None or _scaled(mul, 0.5) is not tanh:
                continue
            for node in mul.users:
                if node.target is aten.add.Tensor and arguments(node) == (mul, 0.5, 1):
                    yield Sigmoid(node, source, (mul, tanh, halved))


def _call(node: Node, target: torch._ops.OpOverload) -> Node | None:
    """The node if it is a call of ``target``, or None."""
    return node if node.target is target else None


def _scaled(node: Node, factor: float) -> Any:
    """The node ``x`` where the node is ``factor * x``, or None."""
    if mul := _call(node, aten.mul.Tensor):
        source, by = arguments(mul)
    elif div := _call(node, aten.div.Tensor):
        source, by = arguments(div)
        by = 1 / by if isinstance(by, (int, float)) and by else None
    else:
        return None
    return source if by == factor else None
