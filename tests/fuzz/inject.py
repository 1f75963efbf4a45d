"""Writes in the middle of a graph."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph

__all__ = ["Inject"]


class Inject:
    """Writes to values in the middle of a graph, as passes and custom operators leave them; the
    same ones in every copy of the graph. AOTAutograd puts a program's own writes at its end."""

    def __init__(self, seed: int | None) -> None:
        self.seed = seed

    def __call__(self, graph: Graph) -> None:
        if self.seed is None:
            return
        aten = torch.ops.aten
        rng = random.Random(self.seed)
        for _ in range(rng.choice((1, 1, 2, 3))):
            nodes = list(graph.nodes)
            writable = [i for i, n in enumerate(nodes) if _is_writable(n.meta.get("val"))]
            if not writable:
                return
            i = rng.choice(writable)
            last = len(nodes) - 2  # before the output
            first = max(i, max((k for k, n in enumerate(nodes) if n.op == "placeholder")))
            if first > last:
                continue
            with graph.inserting_after(nodes[rng.randint(first, last)]):
                target, args = rng.choice(
                    [(aten.mul_.Tensor, (0.5,)), (aten.add_.Tensor, (1,)), (aten.zero_.default, ())]
                )
                node = graph.call_function(target, (nodes[i], *args))
                node.meta["val"] = nodes[i].meta["val"]


def _is_writable(val: Any) -> bool:
    if not isinstance(val, Tensor) or not val.is_floating_point() or not val.dim():
        return False
    return all(s != 0 for s, n in zip(val.stride(), val.shape) if n != 1)
