"""The order of a graph's nodes: positions, writes to memory, random draws, dependencies."""

from __future__ import annotations

import bisect
import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.fx import Graph, Node

__all__ = ["Order", "upstream"]


class Order:
    """Positions of a graph's nodes, of those that write to memory, and of those that draw random
    numbers; built when needed."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._positions: dict[Node, int] | None = None
        self._writes: list[int] = []
        self._draws: list[int] = []

    def __getitem__(self, node: Node) -> int:
        if self._positions is None:
            self._positions = {}
            kinds: dict[Any, tuple[bool, bool]] = {}
            for i, n in enumerate(self._graph.nodes):
                self._positions[n] = i
                if n.op != "call_function":
                    continue
                kind = kinds.get(n.target)
                if kind is None:
                    kind = kinds[n.target] = _writes_memory(n.target), _draws(n.target)
                if kind[0]:
                    self._writes.append(i)
                if kind[1]:
                    self._draws.append(i)
        return self._positions[node]

    def writes_between(self, first: Node, last: Node) -> bool:
        """Whether a node in between writes to memory."""
        return _count_between(self._writes, self[first], self[last]) > 0

    def draws_between(self, first: Node, last: Node) -> int:
        """How many nodes in between draw from the generator, so that their order counts."""
        return _count_between(self._draws, self[first], self[last])


def _count_between(positions: list[int], low: int, high: int) -> int:
    return max(0, bisect.bisect_left(positions, high) - bisect.bisect_right(positions, low))


def _writes_memory(target: Any) -> bool:
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable
    if isinstance(target, torch._ops.HigherOrderOperator):
        return "functional" not in target.name()
    return target is operator.setitem


def _draws(target: Any) -> bool:
    # Inductor's own random operators (prims) take their seed as an input.
    return (
        isinstance(target, torch._ops.OpOverload)
        and torch.Tag.nondeterministic_seeded in target.tags
        and target.namespace != "prims"
    )


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
