"""Small graphs, as ``make_fx`` traces them, in which one guard of the matcher decides."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

import gatefuse
from gatefuse.inductor.fusion_pass import GateFusionPass

BF16 = torch.bfloat16

SHAPES = {"x": (6, 16), "w": (1, 16), "v": (6, 16), "r": (6, 16), "b": (1,)}


@dataclass(frozen=True)
class Guard:
    """A function, how many of its gates are fused, with how many addends, and part of each reason
    for the others. sizes, dtypes: of parameters that are not float32 of the usual size."""

    id: str
    fn: Callable[..., Any]
    fused: int = 0
    reasons: tuple[str, ...] = ()
    addends: int = 0
    sizes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    tracing: str = "fake"

    def inputs(self) -> list[Tensor]:
        names = self.fn.__code__.co_varnames[: self.fn.__code__.co_argcount]
        shapes = SHAPES | self.sizes
        given = [torch.randn(shapes[n]).to(self.dtypes.get(n, torch.float32)) for n in names]
        # Products of signs are exact in bfloat16 too.
        return [t.sign() if t.dtype == BF16 else t for t in given]

    def traced(self) -> tuple[GraphModule, list[Tensor]]:
        inputs = self.inputs()
        return make_fx(self.fn, tracing_mode=self.tracing)(*inputs), inputs

    def check(self) -> None:
        """The pass fuses what it should, names what it leaves alone, and changes no result."""
        module, inputs = self.traced()
        before = pytree.tree_leaves(module(*inputs))
        with gatefuse.record() as report, warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*already erased")
            GateFusionPass()(module.graph)
        module.graph.lint()
        module.recompile()
        for fused, plain in zip(pytree.tree_leaves(module(*inputs)), before, strict=True):
            torch.testing.assert_close(fused, plain)
        (graph,) = report.graphs
        assert graph.error is None
        assert [r.reason for r in graph.rejections if "cannot be read" in r.reason] == []
        assert len(graph.rejections) == len(self.reasons), graph.rejections
        for rejection, reason in zip(graph.rejections, self.reasons):
            assert reason in rejection.reason
        assert graph.fused == self.fused
        assert sum(site.has_addend for site in graph.sites) == self.addends


def gate(x: Tensor, w: Tensor) -> Tensor:
    return torch.sigmoid(F.linear(x, w))
