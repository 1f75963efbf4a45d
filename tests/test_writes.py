"""Writes to memory around the gate: fused or left alone, never wrong.

Functionalisation makes most of them harmless: then the site may be fused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gatefuse.inductor.match_gate import find_sites
from tests.support.comparison import compile_and_compare
from tests.support.forms import float_linear, linear, make_inputs, product_sum
from tests.support.graphs import find, post_grad_graph


def input_written_between(x: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    z = F.linear(x, w)
    x.mul_(2.0)
    return torch.sigmoid(z) * v, x


def weight_written_between(x: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    z = F.linear(x, w)
    w.zero_()
    return torch.sigmoid(z) * v, w


def value_written_between(x: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    gate = torch.sigmoid(F.linear(x, w))
    v[1:].add_(1.0)
    return gate * v, v


def logit_written(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    z = F.linear(x, w)
    y = torch.sigmoid(z) * v
    z.zero_()
    return y + z


def gate_written(x: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    gate = torch.sigmoid(F.linear(x, w))
    y = gate * v
    gate.add_(1.0)
    return y, gate


def value_gated_in_place(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    v.mul_(torch.sigmoid(F.linear(x, w)))
    return v


def output_written(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    y = torch.sigmoid(F.linear(x, w)) * v
    y[0].zero_()
    return y.add_(1.0)


def added_in_place(x: Tensor, w: Tensor, v: Tensor, r: Tensor) -> Tensor:
    r.add_(torch.sigmoid(F.linear(x, w)) * v)
    return r


def addend_written_later(x: Tensor, w: Tensor, v: Tensor, r: Tensor) -> tuple[Tensor, ...]:
    y = torch.sigmoid(F.linear(x, w)) * v
    out = r + y
    r.copy_(y)
    return out, r


def input_is_output_buffer(x: Tensor, w: Tensor) -> Tensor:
    x.copy_(torch.sigmoid(F.linear(x, w)) * x)
    return x


WRITES = [
    input_written_between,
    weight_written_between,
    value_written_between,
    logit_written,
    gate_written,
    value_gated_in_place,
    output_written,
    added_in_place,
    addend_written_later,
    input_is_output_buffer,
]


@pytest.mark.parametrize("fn", WRITES, ids=lambda fn: fn.__name__.replace("_", "-"))
def test_writes(fn: Callable[..., Any]) -> None:
    result = compile_and_compare(fn, make_inputs(fn), mutates=True)
    result.check()
    (graph,) = result.report.graphs
    assert graph.fused + len(graph.rejections) == 1


@pytest.mark.parametrize(
    ("fn", "dtype", "reader"),
    [
        (linear, torch.float32, torch.ops.aten.mm.default),
        (linear, torch.float32, torch.ops.aten.sigmoid.default),
        (product_sum, torch.float32, torch.ops.aten.mul.Tensor),
        (float_linear, torch.bfloat16, torch.ops.prims.convert_element_type.default),
    ],
    ids=["after-linear", "after-sigmoid", "after-product", "after-conversion"],
)
def test_write_in_the_graph(fn: Callable[..., Any], dtype: torch.dtype, reader: Any) -> None:
    """A graph that writes to the input after it was read: the op would read it too late."""
    x, w, v = make_inputs(fn, dtype=dtype)
    graph = post_grad_graph(fn, (x, w, v))
    assert len(find_sites(graph)[0]) == 1
    source = next(iter(graph.nodes))
    with graph.inserting_after(find(graph, reader)[0]):
        graph.call_function(torch.ops.aten.copy_.default, (source, source))
    sites, rejections = find_sites(graph)
    assert not sites
    assert len(rejections) == 1
    assert "written" in rejections[0].reason
