"""Counts the gates that a model has: those in Dynamo's graphs of it, and those that the pass found.

In a graph of Dynamo's, a gate is a weight with one row, ``[1, H]``, that makes one logit per token
which goes into a sigmoid. Whether a multiply follows, and whether the pass fuses it, is another
question. A gate that is written in another way is counted where the pass has found it.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from gatefuse.origin import module_name, origin_of
from gatefuse.records import GraphReport, ModelGates, RejectionReport, SiteReport

__all__ = ["GateCounter"]

_SIGMOIDS = (torch.sigmoid, torch.special.expit, F.sigmoid, "sigmoid", "sigmoid_")
_PRODUCTS: tuple[Any, ...] = (
    *(F.linear, operator.matmul, torch.matmul, torch.mm, torch.mv, torch.bmm, torch.addmm),
    *(torch.baddbmm, torch.einsum, "matmul", "mm", "mv", "bmm", "__matmul__", "__rmatmul__"),
)
_NEAR = 8
"""Nodes from the linear to the sigmoid: views, casts, a bias, a split."""

_Place = tuple[str | None, str | None]
"""The layer and the line of a sigmoid: the same in Dynamo's graph and in the pass's."""


@dataclass
class _Seen:
    """A gate in a graph of Dynamo's. weight: its parameter's name in that graph, or None."""

    place: _Place
    weight: str | None


class GateCounter:
    """Sees every graph that Dynamo makes of a model, before it is compiled."""

    def __init__(self, model: Any) -> None:
        self._model = model if isinstance(model, torch.nn.Module) else None
        self._gates: list[_Seen] = []
        self._cut: list[_Seen] = []
        self._goes_on = False
        self._compiled: set[str] = set()

    def see(self, module: GraphModule) -> None:
        """Note the gates of a graph of Dynamo's."""
        for node in module.graph.nodes:
            if node.op == "placeholder":
                self._compiled.add(_parameter(node) or "")
                size = _shape(node)
                if size and size[-1] == 1 and isinstance(_end(node), Node):
                    self._goes_on = True
            elif (weight := _weight(node)) is not None:
                end = _end(node)
                if isinstance(end, Node):
                    self._gates.append(_Seen(_place(end), _parameter(weight)))
                elif end:
                    self._cut.append(_Seen(_place(node), _parameter(weight)))

    def result(self, graphs: Sequence[GraphReport]) -> ModelGates | None:
        """The model's gates, and which of them the pass has fused in these graphs; None without a
        model."""
        if self._model is None:
            return None
        names = [name for name, _ in self._model.named_parameters(remove_duplicate=False)]
        sites, left = Counter[_Place](), Counter[_Place]()
        for graph in graphs:
            if graph.phase != "backward":
                sites.update(map(_place_of, graph.sites))
                left.update(_place_of(r) for r in graph.rejections if r.kind == "gate")
        seen: dict[_Place, list[_Seen]] = {}
        for gate in self._gates:
            seen.setdefault(gate.place, []).append(gate)
        gates, fused = list[str](), set[str]()
        for place, there in seen.items():
            own = list(dict.fromkeys(n for g in there for n in _named(g, names)))
            gates += own
            # Of as many uses as Dynamo has seen; each may stand for several layers.
            done = min(sites[place], len(there))
            fused.update(own[: len(own) * done // len(there)])
        for place in sites.keys() | left.keys():
            if place not in seen:  # written in another way
                own = [_title(place, i) for i in range(sites[place] + left[place])]
                gates += own
                fused.update(own[: sites[place]])
        if self._goes_on:
            # A graph break between linear and sigmoid: one graph returns logits, another has them.
            gates += [n for gate in self._cut for n in _named(gate, names)]
        order = {name.removesuffix(".weight"): i for i, name in enumerate(names)}
        gates = sorted(dict.fromkeys(gates), key=lambda n: order.get(n, len(order)))
        compiled = {n for weight in self._compiled for n in _whole_names(weight, names)}
        return ModelGates(
            gates=gates,
            fused=[name for name in gates if name in fused],
            not_compiled=[
                name
                for name, module in self._model.named_modules()
                if isinstance(module, torch.nn.Linear)
                and module.out_features == 1
                and f"{name}.weight".lstrip(".") not in compiled
            ],
        )


def _named(gate: _Seen, names: list[str]) -> Iterator[str]:
    """What a gate is called: its linear, or its weight, in the model."""
    whole = _whole_names(gate.weight, names) if gate.weight else []
    yield from (name.removesuffix(".weight") for name in whole)
    if not whole:
        yield _title(gate.place, 0)


def _whole_names(name: str, names: list[str]) -> list[str]:
    """The model's names of a parameter. After a graph break a layer has a graph of its own, which
    serves all layers and names parameters from there on."""
    return [name] if name in names else [n for n in names if name and n.endswith(f".{name}")]


def _title(place: _Place, number: int) -> str:
    """A name for a gate without a parameter's."""
    layer, line = place
    text = f"{layer} ({line})" if layer and line else layer or line or "a gate"
    return f"{text} {number + 1}" if number else text


def _place(sigmoid: Node) -> _Place:
    origin = origin_of(sigmoid)
    return origin.layer, origin.location


def _place_of(found: SiteReport | RejectionReport) -> _Place:
    return found.layer, found.location


def _parameter(node: Node) -> str | None:
    """The name of the parameter that an input of a graph is, counted from the frame's module."""
    source = getattr(node.meta.get("grapharg"), "source", None)
    name = getattr(source, "name", None)
    text = str(name() if callable(name) else name)
    if "_parameters[" not in text:
        return None
    return module_name(text.replace("._parameters[", "["))


def _weight(node: Node) -> Node | None:
    """The row of weights with which a node multiplies rows, to one number per row, or None."""
    if node.op not in ("call_function", "call_method") or node.target not in _PRODUCTS:
        return None
    out = _shape(node)
    sizes = [(n, s) for n in node.all_input_nodes if (s := _shape(n)) is not None]
    for weight, row in sizes:
        width = _numel(row)
        if out is None or width < 2 or max(row) != width:
            continue
        if any(
            n is not weight and s and s[-1] == width and _numel(out) * width == _numel(s)
            for n, s in sizes
        ):
            sources = weight.all_input_nodes
            while len(sources) == 1 and _numel(_shape(sources[0]) or ()) == width:
                weight, sources = sources[0], sources[0].all_input_nodes
            return weight
    return None


def _end(logits: Node) -> Node | bool:
    """The sigmoid into which one number per row goes; else whether it leaves the graph."""
    numel = _numel(_shape(logits) or ())
    queue, returned = [(logits, 0)], False
    for node, distance in queue:
        for user in node.users:
            size = _shape(user)
            if user.target in _SIGMOIDS:
                return user
            if user.op == "output":
                returned = True
            elif distance < _NEAR and size is not None and _numel(size) == numel:
                queue.append((user, distance + 1))
    return returned


def _shape(node: Node) -> tuple[Any, ...] | None:
    value = node.meta.get("example_value")
    return tuple(map(_hint, value.shape)) if isinstance(value, torch.Tensor) else None


def _hint(size: Any) -> int:
    """A symbolic size as the number that it has in this call."""
    node = getattr(size, "node", None)
    hint = size if node is None else node.hint if node.has_hint() else 0
    return int(hint)


def _numel(size: tuple[int, ...]) -> int:
    result = 1
    for n in size:
        result *= n
    return result
