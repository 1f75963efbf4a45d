"""The order of a graph's nodes: positions, writes to memory, random draws, dependencies."""

from __future__ import annotations

import bisect
import itertools
import operator
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, GraphModule, Node

from gatefuse.inductor.fx_utils import arguments

__all__ = ["KeptLogits", "Order", "Stretches", "is_sorted", "put_back", "sort", "upstream"]


def is_sorted(graph: Graph) -> bool:
    """Whether each node comes after its inputs. A pass may leave a graph unsorted: Inductor and
    vLLM sort once all passes have run."""
    seen = set[Node]()
    for node in graph.nodes:
        if not seen.issuperset(node.all_input_nodes):
            return False
        seen.add(node)
    return True


def sort(graph: Graph) -> None:
    """Put each node after its inputs, as Inductor does. An error leaves some nodes moved."""
    from torch._inductor.pattern_matcher import stable_topological_sort

    stable_topological_sort(graph)


def put_back(order: list[Node]) -> None:
    """Put the nodes of a graph back into an order that it had."""
    for node, following in itertools.pairwise(order):
        node.append(following)


class Order:
    """Positions of a graph's nodes, of those that write to memory, and of those that draw random
    numbers; built when needed."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._positions: dict[Node, int] | None = None
        self._writes: list[int] = []
        self._draws = 0

    def __getitem__(self, node: Node) -> int:
        return self._read()[node]

    def _read(self) -> dict[Node, int]:
        if self._positions is None:
            self._positions = {}
            effects = _EffectsOf()
            for i, n in enumerate(self._graph.nodes):
                self._positions[n] = i
                writes, draws = effects.of_node(n)
                if writes:
                    self._writes.append(i)
                self._draws += draws
        return self._positions

    def writes_between(self, first: Node, last: Node) -> bool:
        """Whether a node in between writes to memory."""
        low, high = self[first], self[last]
        return _count_between(self._writes, low, high) > 0

    def draws(self) -> int:
        """How many nodes draw from a generator, so that their order counts."""
        self._read()
        return self._draws


def _count_between(positions: list[int], low: int, high: int) -> int:
    return bisect.bisect_left(positions, high) - bisect.bisect_right(positions, low)


class Stretches:
    """Disjoint stretches of positions, of which those that overlap become one."""

    def __init__(self) -> None:
        self._lows: list[int] = []
        self._highs: list[int] = []

    def _overlapped(self, low: int, high: int) -> slice:
        return slice(bisect.bisect_left(self._highs, low), bisect.bisect_right(self._lows, high))

    def union(self, low: int, high: int) -> tuple[int, int]:
        """The stretch with those that it overlaps."""
        found = self._overlapped(low, high)
        return min([low, *self._lows[found]]), max([high, *self._highs[found]])

    def add(self, low: int, high: int) -> None:
        """Add a stretch, as one with those that it overlaps."""
        found, union = self._overlapped(low, high), self.union(low, high)
        self._lows[found], self._highs[found] = [union[0]], [union[1]]


class KeptLogits:
    """The sites so far of which the op returns the logit too, each by its logit and its anchor.

    What reads such a logit moves to after the op. Where the sites' stretches of the graph, from
    logit to op, overlap, one op may have to wait for another, and what moves with one moves on with
    the other: within the union of such stretches, and no further.
    """

    def __init__(self, order: Order) -> None:
        self._order = order
        self._operands: dict[Node, list[Node]] = {}
        self._moves = Stretches()

    def depends(self, nodes: list[Node], logit: Node, chain: set[Node]) -> bool:
        """Whether ``nodes`` depend on a logit or the rest of its chain, or will after the rewrite,
        when each kept logit depends on its op's operands."""
        position = self._order[logit]
        lowest, _ = self._moves.union(position, position)
        return not chain.isdisjoint(upstream(nodes, lowest, self._order, self._operands))

    def add(self, logit: Node, anchor: Node, operands: list[Node]) -> None:
        """Add a site whose op takes the place of its logit."""
        self._operands[logit] = operands
        self._moves.add(self._order[logit], self._order[anchor])


class _Effects(NamedTuple):
    writes: bool
    draws: bool


_FUNCTIONAL = ("auto_functionalized", "auto_functionalized_v2", "triton_kernel_wrapper_functional")
"""Higher-order operators that stand for something which writes, on copies of their own."""


class _EffectsOf:
    """What calls do besides computing their results; remembers what it has read."""

    def __init__(self) -> None:
        self._known: dict[Any, _Effects] = {}

    def of_node(self, node: Node) -> _Effects:
        if node.op != "call_function":
            return _Effects(node.op in ("call_module", "call_method"), False)
        target = node.target
        if isinstance(target, torch._ops.HigherOrderOperator):
            return self._of_higher_order(node, target.name())
        if target not in self._known:
            self._known[target] = _effects_of(target)
        writes, draws = self._known[target]
        return _Effects(writes, draws and not _drops_nothing(node))

    def _of_higher_order(self, node: Node, name: str) -> _Effects:
        """By what it calls: operators and bodies among its arguments."""
        if name in _FUNCTIONAL:
            return _Effects(False, False)
        called: list[_Effects] = []
        for argument in (*node.args, *node.kwargs.values()):
            if isinstance(argument, torch._ops.OpOverload):
                called.append(_effects_of(argument))
            elif isinstance(argument, Node) and argument.op == "get_attr":
                body = getattr(node.graph.owning_module, str(argument.target), None)
                if isinstance(body, GraphModule):
                    called.append(self._of_body(body))
        # One that calls nothing, as a Triton kernel's wrapper, or whose effects are its purpose.
        unknown = not called or name == "with_effects"
        return _Effects(unknown or any(c.writes for c in called), any(c.draws for c in called))

    def _of_body(self, body: GraphModule) -> _Effects:
        if body not in self._known:
            inside = [self.of_node(n) for n in body.graph.nodes]
            self._known[body] = _Effects(
                any(e.writes for e in inside), any(e.draws for e in inside)
            )
        return self._known[body]


def _drops_nothing(node: Node) -> bool:
    """Whether a node that may drop elements, as attention does in training, has none to drop."""
    declared = node.target._schema.arguments  # type: ignore[union-attr]
    named = {a.name: value for a, value in zip(declared, arguments(node))}
    return named.get("dropout_p", named.get("dropout", 1.0)) == 0.0


def _effects_of(target: Any) -> _Effects:
    if not isinstance(target, torch._ops.OpOverload):
        return _Effects(target is operator.setitem, False)
    # Of Inductor's own random operators those draw that make seeds, not those that take one.
    seeded = torch.Tag.nondeterministic_seeded in target.tags
    return _Effects(target._schema.is_mutable, seeded)


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
