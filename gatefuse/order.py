"""The order of a graph's nodes: positions, writes to memory, dependencies."""

from __future__ import annotations

import bisect
import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.fx import Graph, Node

__all__ = ["Order", "upstream"]


class Order:
    """Positions of the nodes of a graph, and of those that write to memory; built when needed."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._positions: dict[Node, int] | None = None
        self._writes: list[int] = []

    def __getitem__(self, node: Node) -> int:
        if self._positions is None:
            self._positions = {}
            mutable: dict[Any, bool] = {}
            for i, n in enumerate(self._graph.nodes):
                self._positions[n] = i
                if n.op != "call_function":
                    continue
                writes = mutable.get(n.target)
                if writes is None:
                    writes = mutable[n.target] = _writes_memory(n.target)
                if writes:
                    self._writes.append(i)
        return self._positions[node]

    def writes_between(self, first: Node, last: Node) -> bool:
        low, high = self[first], self[last]
        i = bisect.bisect_right(self._writes, low)
        return i < len(self._writes) and self._writes[i] < high


def _writes_memory(target: Any) -> bool:
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable
    if isinstance(target, torch._ops.HigherOrderOperator):
        return "functional" not in target.name()
    return target is operator.setitem


def upstream(
    starts: list[Node], lowest: int, order: Order, further: Mapping[Node, list[Node]]
) -> Iterator[Node]:
    """Nodes that ``starts`` depend on, themselves included, not before position ``lowest``.

    further: nodes that a node will depend on besides its inputs.
    """
    seen: set[Node] = set()
    stack = [n for n in starts if order[n] >= lowest]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        inputs = (*node.all_input_nodes, *further.get(node, ()))
        stack.extend(n for n in inputs if order[n] >= lowest)
