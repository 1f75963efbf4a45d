"""Counts the gates that a model has, from the graphs that Dynamo makes of it.

A gate is seen where a weight with one row, ``[1, H]``, makes one logit per token that goes into a
sigmoid. Whether a multiply follows, and whether the pass fuses it, is another question.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from gatefuse.origin import layer_of
from gatefuse.records import ModelGates, SiteReport

__all__ = ["GateCounter"]

_SIGMOIDS = (torch.sigmoid, torch.special.expit, F.sigmoid, "sigmoid", "sigmoid_")
_PRODUCTS: tuple[Any, ...] = (
    *(F.linear, operator.matmul, torch.matmul, torch.mm, torch.mv, torch.bmm, torch.addmm),
    *(torch.baddbmm, torch.einsum, "matmul", "mm", "mv", "bmm", "__matmul__", "__rmatmul__"),
)
_NEAR = 8
"""Nodes from the linear to the sigmoid: views, casts, a bias, a split."""


class GateCounter:
    """Sees every graph that Dynamo makes of a model, before it is compiled."""

    def __init__(self, model: Any) -> None:
        self._named = _candidates(model) if isinstance(model, torch.nn.Module) else None
        self._gates: dict[str, None] = {}
        self._cut: dict[str, None] = {}
        self._goes_on = False
        self._compiled: set[str] = set()

    def see(self, module: GraphModule) -> None:
        """Note the gates of a graph of Dynamo's."""
        for node in module.graph.nodes:
            layer = layer_of(node)
            if (node.op != "call_function" and node.op != "call_method") or layer is None:
                continue
            self._compiled.add(layer)
            if _makes_logits(node):
                end = _end(node)
                if end == "sigmoid":
                    self._gates[layer] = None
                elif end == "output":
                    self._cut[layer] = None
        for node in module.graph.find_nodes(op="placeholder"):
            size = _shape(node)
            if size and size[-1] == 1 and _end(node) == "sigmoid":
                self._goes_on = True

    def result(self, sites: list[SiteReport]) -> ModelGates | None:
        """The model's gates, those with one of the sites as fused; None without a model.

        Code that was compiled once may serve several layers: a name in a graph that is not one of
        the model's, because a graph break has made a frame of a layer's own, stands for each module
        whose name ends so.
        """
        if self._named is None:
            return None
        # A graph break between linear and sigmoid: one graph returns logits, another takes them.
        gates = _named(self._gates | (self._cut if self._goes_on else {}), self._named)
        fused = _named({s.linear: None for s in sites if s.linear is not None}, self._named)
        compiled = set(_named(dict.fromkeys(self._compiled), self._named))
        linears = [name for name, is_linear in self._named.items() if is_linear]
        return ModelGates(
            gates=gates,
            fused=[name for name in gates if name in fused],
            not_compiled=[name for name in linears if name not in compiled],
        )


def _candidates(model: torch.nn.Module) -> dict[str, bool]:
    """Names of the modules with a weight ``[1, H]``; whether each is a ``Linear(H, 1)``."""
    found = {}
    for name, module in model.named_modules():
        is_linear = isinstance(module, torch.nn.Linear) and module.out_features == 1
        own = module.parameters(recurse=False)
        if is_linear or any(p.dim() <= 2 and p.numel() == max(p.shape, default=0) for p in own):
            found[name] = is_linear
    return found


def _named(seen: dict[str, Any], names: dict[str, bool]) -> list[str]:
    """The model's names of what graphs have seen, in the model's order."""
    endings = tuple(f".{name}" for name in seen if name and name not in names)
    return [name for name in names if name in seen or f".{name}".endswith(endings)]


def _makes_logits(node: Node) -> bool:
    """Whether a node multiplies rows with one row of weights, to one number per row."""
    if node.target in _PRODUCTS:
        out = _shape(node)
        sizes = [s for s in map(_shape, node.all_input_nodes) if s is not None]
        rows = [s for s in sizes if max(s, default=0) == _numel(s) > 1]
        return out is not None and any(
            size and size[-1] == _numel(weight) and _numel(out) * size[-1] == _numel(size)
            for weight in rows
            for size in sizes
            if size is not weight
        )
    return False


def _end(logits: Node) -> str:
    """Where one number per row goes: ``"sigmoid"``, else ``"output"``, or nowhere of interest."""
    numel = _numel(_shape(logits) or ())
    queue, end = [(logits, 0)], ""
    for node, distance in queue:
        for user in node.users:
            size = _shape(user)
            if user.target in _SIGMOIDS:
                return "sigmoid"
            if user.op == "output":
                end = "output"
            elif distance < _NEAR and size is not None and _numel(size) == numel:
                queue.append((user, distance + 1))
    return end


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
