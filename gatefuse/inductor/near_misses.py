"""Finds what its author may take for a gate: other functions in the place of the sigmoid."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Set

import torch
from torch.fx import Graph, Node

from gatefuse.inductor.fx_utils import described, known, same_shape, tensor_of, val_of
from gatefuse.inductor.match_linear import PACKED

__all__ = ["near_misses", "scales_rows_in_part"]

aten = torch.ops.aten

_LINEARS = (aten.mm.default, aten.addmm.default, aten.mv.default, aten.bmm.default)
_PARTS = (
    *(aten.slice.Tensor, aten.select.int, aten.unsqueeze.default, aten.view.default),
    *(aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int, operator.getitem),
)
_FARTHEST = 12
"""Nodes between linear and multiply; a two-class softmax takes eight."""


def near_misses(graph: Graph, taken: Set[Node]) -> Iterator[tuple[Node, str]]:
    """Each ``linear(H -> 1)`` whose result, through a function of one logit per row that is not a
    sigmoid, scales rows, and each that is packed with its sigmoid. With the reason."""
    for target in _LINEARS:
        for linear in graph.find_nodes(op="call_function", target=target):
            val = val_of(linear)
            if linear in taken or val is None:
                continue
            if target is aten.mv.default or known(val.shape[-1] == 1):
                functions = _functions_to_product(linear)
                if functions:
                    names = ", ".join(dict.fromkeys(map(described, functions)))
                    yield (
                        functions[0],
                        f"not a sigmoid, but {names}, stands between linear and product",
                    )
    for node in graph.nodes:
        # Inductor packs linears for the CPU in functions of its own, activations included.
        packed = isinstance(node.target, functools.partial)
        if packed and any(_scales_rows(node, user) for user in node.users):
            yield node, PACKED


def _functions_to_product(linear: Node) -> list[Node]:
    """The nodes that compute on the way from a linear to a product with wider rows, or nothing if
    there is no such product or a sigmoid on the way."""
    queue: list[tuple[Node, list[Node]]] = [(linear, [])]
    seen: set[Node] = set()
    for node, functions in queue:
        if node in seen or len(seen) > 4 * _FARTHEST:
            continue
        val = tensor_of(node, "a node on the way")
        seen.add(node)
        for user in node.users:
            out = val_of(user)
            if user.target is aten.sigmoid.default or out is None or out.dim() < 1:
                continue
            if _scales_rows(node, user):
                if functions:
                    return functions
            elif len(functions) < _FARTHEST and _per_row(user, val, out):
                queue.append((user, [*functions, user]))
    return []


def _scales_rows(gate: Node, product: Node) -> bool:
    """Whether one value of ``gate`` scales each row of the other factor."""
    out, gv = val_of(product), val_of(gate)
    return (
        product.target in (aten.mul.Tensor, aten.div.Tensor)
        and out is not None
        and gv is not None
        and gv.dim() == out.dim() >= 2
        and known(gv.shape[-1] == 1)
        and isinstance(out.shape[-1], int)
        and out.shape[-1] > 2
    )


def scales_rows_in_part(sigmoid: Node) -> bool:
    """Whether one column of a sigmoid scales rows, as one of several gates in one linear does."""
    queue = [sigmoid]
    for node in queue:
        for user in node.users:
            if user.target in _PARTS:
                queue.append(user)
            elif node is not sigmoid and _scales_rows(node, user):
                return True
    return False


def _per_row(node: Node, source: torch.Tensor, out: torch.Tensor) -> bool:
    """Whether a node computes a value or two for each row, as an activation does, from ``source``,
    which has one or two."""
    wide = not (known(out.shape[-1] == 1) or known(out.shape[-1] == 2))
    return not wide or same_shape(out.shape, source.shape)
