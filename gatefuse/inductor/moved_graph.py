"""A graph that was traced on the CPU, as one for a GPU that this machine does not have.

Autograd, indexing from Python, the folding of constants and the metadata of convolutions need the
device itself. All of that is done when the passes begin that see a forward or a backward graph by
itself; they look at metadata, and at the device in it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph
from torch.utils import _pytree as pytree

from gatefuse.inductor.hooks import passes_of

__all__ = ["MoveGraph", "decompositions_for_gpu"]

aten = torch.ops.aten
_CPU = torch.device("cpu")


class MoveGraph(CustomGraphPass):
    """The passes of a hook, and then each tensor of the graph is one on ``device``."""

    def __init__(self, device: torch.device, before: Any) -> None:
        self._device = device
        self._passes = passes_of(before)

    def __call__(self, graph: Graph) -> None:
        """Change metadata, and the device that nodes name, in place."""
        for graph_pass in self._passes:
            graph_pass(graph)
        for node in graph.nodes:
            for key in ("val", "tensor_meta"):
                if key in node.meta:
                    node.meta[key] = _moved(node.meta[key], self._device)
            node.args, node.kwargs = pytree.tree_map(
                lambda a: self._device if a == _CPU and isinstance(a, torch.device) else a,
                (node.args, node.kwargs),
            )

    def uuid(self) -> None:
        """No caching."""


def _moved(value: Any, device: torch.device) -> Any:
    """Fake tensors on the CPU as fake ones on the device; everything else as it is."""

    def move(t: Any) -> Any:
        if not isinstance(t, Tensor) or t.device != _CPU:
            return t
        mode = getattr(t, "fake_mode", None)
        if mode is None:
            return t
        with mode, _no_guards(mode):
            return torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device=device)

    return pytree.tree_map(move, value)


def _no_guards(mode: Any) -> contextlib.AbstractContextManager[None]:
    suppressed: Any = contextlib.nullcontext()
    return suppressed if mode.shape_env is None else mode.shape_env.suppress_guards()


def decompositions_for_gpu() -> dict[Any, Callable[..., Any]]:
    """Inductor's, without those that take matrix products apart on a CPU."""
    from torch._inductor.decomposition import select_decomp_table

    products: Sequence[Any] = (aten.mm, aten.bmm, aten.addmm)
    table = dict(select_decomp_table())
    for op in table.copy():
        if getattr(op, "overloadpacket", op) in products:
            del table[op]
    return table
