"""Tiny random transformers models: each shared-expert gate is one op, and nothing else changes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support import models
from tests.support.comparison import compile_and_compare
from tests.support.graphs import op_nodes

BF16 = torch.bfloat16


@dataclass(frozen=True)
class Cell:
    """One model under one set of conditions; the conditions are spread pairwise over the cells."""

    model: str
    dtype: torch.dtype = torch.float32
    dynamic: bool = False
    train: bool = False
    autocast: bool = False
    coordinate_descent: bool = False
    config: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        flags = ("dynamic", "train", "autocast", "coordinate_descent")
        words = [self.model, str(self.dtype).removeprefix("torch."), *self.config]
        return "-".join(words + [name for name in flags if getattr(self, name)])


class Autocast(nn.Module):
    """A model under bfloat16 autocast."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, BF16):
            return self.model(x).float()


def compare(cell: Cell, alone: bool = False) -> Any:
    model: nn.Module = models.build(cell.model, cell.dtype, **cell.config)
    if cell.autocast:
        model = Autocast(model)
    inputs = models.embeddings(2, 6, cell.dtype)
    more: tuple[tuple[Tensor, ...], ...] = ()
    if cell.dynamic:
        torch._dynamo.mark_dynamic(inputs, 1)
        more = ((models.embeddings(2, 9, cell.dtype),),)
    result = compile_and_compare(
        model,
        (inputs.requires_grad_(cell.train),),
        dynamic=None if cell.dynamic else False,
        grad=cell.train,
        coordinate_descent=cell.coordinate_descent,
        more_inputs=tuple((x.requires_grad_(cell.train),) for (x,) in more),
        alone=alone,
        fullgraph=True,
    )
    return model, result


DELTA_NET = {"layer_types": ["linear_attention", "full_attention"]}
ONE_LAYER = {"num_hidden_layers": 1}

GATED = [
    Cell("qwen2_moe"),
    Cell("qwen2_moe", BF16, dynamic=True, train=True, coordinate_descent=True, config=ONE_LAYER),
    Cell("qwen2_moe", autocast=True, dynamic=True, coordinate_descent=True, config=ONE_LAYER),
    Cell("qwen3_next", BF16, config=DELTA_NET),
    Cell("qwen3_next", dynamic=True, train=True, config=ONE_LAYER),
    Cell("qwen3_5_moe", BF16, dynamic=True, coordinate_descent=True),
    Cell("qwen3_5_moe", autocast=True, train=True, config=ONE_LAYER),
    Cell("qwen3_omni_moe", dynamic=True, coordinate_descent=True),
    Cell("qwen3_omni_moe", BF16, train=True, config=ONE_LAYER),
]


@pytest.mark.parametrize("cell", GATED, ids=str)
def test_every_gate_is_one_op(cell: Cell) -> None:
    model, result = compare(cell)
    gates = models.gates(model)
    assert gates == cell.config.get("num_hidden_layers", 2)
    (graph,) = [g for g in result.report.graphs if g.phase != "backward"]
    assert graph.phase == ("forward" if cell.train else "inference")
    assert graph.fused == op_nodes(graph.after) == gates
    # Under autocast the routed experts' output is float32 and the product bfloat16: no addend then.
    assert [site.has_addend for site in graph.sites] == [not cell.autocast] * gates
    assert all("modeling_" in (site.location or "") for site in graph.sites)
    result.check(BF16 if cell.autocast else None)


UNGATED = [Cell("minimax", BF16), Cell("afmoe"), Cell("deepseek_v3", BF16), Cell("llama4")]


@pytest.mark.parametrize("cell", UNGATED, ids=str)
def test_models_without_the_gate_do_not_change(cell: Cell) -> None:
    model, result = compare(cell, alone=True)
    assert models.gates(model) == 0
    assert result.report.fused == 0
    assert not result.report.sites
    result.check_identical()


def test_experts_that_break_the_graph() -> None:
    """transformers' plain expert loop breaks the graph: one compiled graph serves every layer."""
    model = models.build("qwen2_moe", experts="eager")
    result = compile_and_compare(model, (models.embeddings(2, 6),))
    with_gate = [g for g in result.report.graphs if g.fused]
    assert with_gate
    assert all(g.fused == op_nodes(g.after) == 1 for g in with_gate)
    assert all("modeling_qwen2_moe" in (s.location or "") for s in result.report.sites)
    result.check()
