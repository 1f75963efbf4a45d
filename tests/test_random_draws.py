"""Rewrites move nodes: random numbers are drawn in the order of the program."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor_config
import torch.nn.functional as F
from torch import Tensor
from torch._inductor import inductor_prims
from torch.utils.checkpoint import checkpoint

import gatefuse
from gatefuse.inductor.match_gate import find_sites
from tests.support.graphs import traced

aten = torch.ops.aten


def randn(*shape: int) -> Tensor:
    return torch.randn(shape)


def trained(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape).requires_grad_() for shape in shapes]


def draws_of_two_gates(x: Tensor, wa: Tensor, wb: Tensor, v: Tensor, v2: Tensor) -> Any:
    """Gate A waits for gate B's logit; a draw reads A's logit, another stands before B's op."""
    za = F.linear(x, wa)
    first = torch.poisson(za.detach().abs().expand(5, 16))
    zb = F.linear(x, wb)
    ya = torch.sigmoid(za) * (v + zb)
    second = torch.rand_like(v2)
    return ya, torch.sigmoid(zb) * v2, first, second


def draws_of_three_gates(x: Tensor, wa: Tensor, wb: Tensor, wc: Tensor, v: Tensor) -> Any:
    """The same over a chain: A waits for B, B for C."""
    za = F.linear(x, wa)
    first = torch.poisson(za.detach().abs().expand(5, 16))
    zb = F.linear(x, wb)
    ya = torch.sigmoid(za) * (v + zb)
    zc = F.linear(x, wc)
    yb = torch.sigmoid(zb) * (v + zc)
    second = torch.rand_like(v)
    return ya, yb, torch.sigmoid(zc) * v, first, second


@pytest.mark.parametrize("fn", [draws_of_two_gates, draws_of_three_gates])
def test_draws_keep_their_order(fn: Callable[..., Any]) -> None:
    widths = (
        (5, 16),
        (1, 16),
        (1, 16),
        (1, 16) if fn is draws_of_three_gates else (5, 16),
        (5, 16),
    )
    inputs = trained(*widths)
    results = []
    for fuse in (False, True):
        torch._dynamo.reset()
        block = gatefuse.fusing() if fuse else contextlib.nullcontext()
        with inductor_config.patch(fallback_random=True), block as report:
            torch.manual_seed(5)
            results.append(torch.compile(fn)(*inputs))
    assert report is not None and report.fused == 0
    assert "drawn more than once" in report.rejections[0].reason
    for plain, fused in zip(*results):
        assert torch.equal(fused, plain)


def seeds_after_a_draw(x: Tensor, w: Tensor, v: Tensor) -> Any:
    """Inductor makes the seeds of its own random numbers by a draw."""
    z = F.linear(x, w)
    first = torch.poisson(z.abs())
    second = torch.rand_like(v)
    return torch.sigmoid(z) * v, first, second


def test_draws_keep_their_order_without_fallback() -> None:
    inputs = randn(8, 4), randn(1, 4), randn(8, 4)
    results = []
    for fuse in (False, True):
        torch._dynamo.reset()
        block = gatefuse.fusing() if fuse else contextlib.nullcontext()
        with torch.no_grad(), block:
            torch.manual_seed(5)
            results.append(torch.compile(seeds_after_a_draw)(*inputs))
    for plain, fused in zip(*results):
        assert torch.equal(fused, plain)


def dropout_in_the_value(x: Tensor, w: Tensor, v: Tensor, a: Tensor) -> Tensor:
    gate = torch.sigmoid(F.linear(x, w))
    return gate * F.dropout(v @ a, 0.1)


@pytest.mark.parametrize("fallback", [False, True])
def test_one_draw_under_checkpointing(fallback: bool) -> None:
    """The operators that keep and restore a generator's state write no memory."""
    inputs = trained((6, 32), (1, 32), (6, 32), (32, 32))

    def fn(*args: Tensor) -> Any:
        return checkpoint(dropout_in_the_value, *args, use_reentrant=False)

    results = []
    for fuse in (False, True):
        torch._dynamo.reset()
        block = gatefuse.fusing() if fuse else contextlib.nullcontext()
        with inductor_config.patch(fallback_random=fallback), block as report:
            torch.manual_seed(5)
            out = torch.compile(fn)(*inputs)
            results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    assert report is not None
    assert [g.fused for g in report.graphs if g.phase == "forward"] == [1]
    for plain, fused in zip(*results):
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4)


def two_draws(x: Tensor, w: Tensor, v: Tensor) -> Any:
    """The first reads the logit, which the op returns after the second."""
    z = F.linear(x, w)
    first, second = torch.poisson(z.abs()), torch.rand_like(v)
    return torch.sigmoid(z) * v, z, first, second


@pytest.mark.parametrize("draws", [0, 1, 2])
def test_one_draw_in_a_graph_has_no_order(draws: int) -> None:
    """Two have: Inductor's scheduler may turn them round when kernels change."""
    graph = traced(two_draws, randn(6, 16), randn(1, 16))
    found = [
        n for n in graph.nodes if torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ())
    ]
    assert len(found) == 2
    for node in found[draws:]:
        node.target, node.args, node.kwargs = aten.relu.default, node.args[:1], {}
    sites, rejections = find_sites(graph)
    assert len(sites) == (draws < 2)
    assert ["random numbers" in r.reason for r in rejections] == [True] * (draws == 2)


def test_one_draw_for_two_gates() -> None:
    """It is counted once, however many gates ask."""

    def fn(x: Tensor, w: Tensor, v: Tensor) -> Any:
        drawn = torch.rand_like(v)
        return [torch.sigmoid(F.linear(t, w)) * drawn for t in (x, v)]

    assert len(find_sites(traced(fn, randn(6, 16), randn(1, 16)))[0]) == 2


def two_attentions(x: Tensor, w: Tensor, v: Tensor, p: float = 0.0) -> Tensor:
    for _ in range(2):
        rows = v.unflatten(1, (1, 4, 4)).transpose(0, 1)
        rows = F.scaled_dot_product_attention(rows, rows, rows, dropout_p=p)
        v = torch.sigmoid(F.linear(x, w)) * rows.transpose(0, 1).flatten(1)
    return v


def test_attention_without_dropout_draws_nothing() -> None:
    """Its operators are marked as random, whatever their dropout is."""
    inputs = randn(6, 16), randn(1, 16), randn(6, 16)
    with torch.no_grad(), gatefuse.fusing(expect=2):
        torch.compile(two_attentions)(*inputs)


@pytest.mark.parametrize("seeds", [False, True])
def test_inductors_draws_have_an_order_by_their_seeds(seeds: bool) -> None:
    """Its random operators compute from a seed; the seed is drawn."""
    graph = traced(two_draws, randn(6, 16), randn(1, 16))
    (second,) = graph.find_nodes(op="call_function", target=aten.rand_like.default)
    second.target, second.kwargs = inductor_prims.random, {}
    second.args = ([6, 16], graph.find_nodes(op="placeholder")[0], "rand")
    if seeds:
        second.target, second.args = inductor_prims.seeds, (1, torch.device("cpu"))
    sites, rejections = find_sites(graph)
    assert len(sites) == 1 - seeds
    assert ["random numbers" in r.reason for r in rejections] == [True] * seeds
