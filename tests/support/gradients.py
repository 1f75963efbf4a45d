"""The rewrite of a gate's gradients, which is that of a GPU, on the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.fx import Graph, Node, map_arg

import gatefuse
from gatefuse.inductor import cost_model, gradient_rewriter
from gatefuse.records import GradientReport

aten = torch.ops.aten
_ON_A_GPU = SimpleNamespace(device=torch.device("cuda"))


@contextlib.contextmanager
def rewritten_gradients(on: bool = True) -> Iterator[None]:
    """Compilations rewrite what they would on a GPU. Not ``on``: nothing changes."""
    if not on:
        yield
        return
    decides_for_a_gpu = mock.patch.object(cost_model, "tensor_of", return_value=_ON_A_GPU)
    with decides_for_a_gpu:
        yield


def are_rewritten() -> bool:
    """Whether this is inside of :func:`rewritten_gradients`."""
    return isinstance(cost_model.tensor_of, mock.Mock)


def rewritten(report: gatefuse.Report) -> int:
    """Gates whose gradients were rewritten; all are, or the reason is the failure."""
    found = [gradients for graph in report.graphs for gradients in graph.gradients]
    assert not [g.reason for g in found if g.reason]
    return sum(g.rewritten > 0 for g in found)


class BackwardGraph:
    """The graph of a gate's backward by hand, as far as the logit's gradient ``dz``, [9, 1]; also
    the nodes that it is made of."""

    def __init__(self) -> None:
        self.graph = Graph()
        shapes = {
            "grad": (9, 32),
            "v": (9, 32),
            "z": (9, 1),
            "w": (1, 32),
            "a": (9, 4),
            "b": (4, 32),
        }
        self.inputs = {name: self.input(name, *shape) for name, shape in shapes.items()}
        self.gate = self.call(aten.sigmoid.default, self.inputs["z"])
        self.complement = self.call(aten.sub.Tensor, 1, self.gate)
        self.slope = self.mul(self.gate, self.complement)
        self.product = self.mul(self.inputs["grad"], self.inputs["v"])
        self.row_sum = self.call(aten.sum.dim_IntList, self.product, [1], True)
        self.dz = self.mul(self.row_sum, self.slope)

    def input(self, name: str, *shape: int) -> Node:
        node = self.graph.placeholder(name)
        node.meta["val"] = torch.empty(*shape, device="meta")
        return node

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        node = self.graph.call_function(target, args, kwargs)
        values = map_arg(args, lambda n: n.meta["val"])
        node.meta["val"] = target(*values, **kwargs)
        return node

    def mul(self, left: Any, right: Any) -> Node:
        return self.call(aten.mul.Tensor, left, right)

    def rewrite(self, *outputs: Node, **options: Any) -> list[GradientReport]:
        """Rewrite the graph, as on a GPU: the meta device has its rules. Returns the reports."""
        self.graph.output(outputs)
        self.graph.eliminate_dead_code()
        found = gradient_rewriter.rewrite_gradients(self.graph, gatefuse.Options(**options))
        self.graph.lint()
        return found
