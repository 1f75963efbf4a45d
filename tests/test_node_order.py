"""Rewrites move nodes: no write to memory is passed. Graphs that others left out of order."""

from __future__ import annotations

import operator
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph
from torch.fx.experimental.proxy_tensor import make_fx

import gatefuse
from gatefuse.inductor.fusion_pass import GateFusionPass
from gatefuse.inductor.match_gate import find_sites
from gatefuse.inductor.node_order import Stretches, is_sorted
from tests.support.graphs import copy_of, traced

aten = torch.ops.aten


def randn(*shape: int) -> Tensor:
    return torch.randn(shape)


def trained(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape).requires_grad_() for shape in shapes]


# --- higher-order operators ---------------------------------------------------------------------


@torch.compiler.nested_compile_region
def _expert(v: Tensor, a: Tensor) -> Tensor:
    return F.silu(v @ a)


def value_from_a_region(x: Tensor, w: Tensor, v: Tensor, a: Tensor) -> Tensor:
    for _ in range(2):
        gate = torch.sigmoid(F.linear(x, w))
        v = gate * _expert(v, a)
    return v


def value_from_a_branch(x: Tensor, w: Tensor, v: Tensor, a: Tensor) -> Tensor:
    gate = torch.sigmoid(F.linear(x, w))
    return gate * torch.cond(a.sum() > 0, lambda v: v * 2, lambda v: v - 1, (v,))


@pytest.mark.parametrize("fn", [value_from_a_region, value_from_a_branch])
def test_operators_that_only_compute_are_passed(fn: Callable[..., Any]) -> None:
    inputs = trained((4, 16), (1, 16), (4, 16), (16, 16))
    with gatefuse.fusing() as report:
        out = torch.compile(fn)(*inputs)
    torch.testing.assert_close(out, fn(*inputs))
    assert max(g.fused for g in report.graphs if g.phase == "forward") >= 1


def body_that_writes(v: Tensor) -> Tensor:
    return v.add_(1.0)


def test_a_body_that_writes_is_not_passed() -> None:
    """The body of a higher-order operator is read: one in-place operator makes it a write."""
    graph = traced(lambda x, w, v: torch.sigmoid(F.linear(x, w)) * v, randn(6, 16), randn(1, 16))
    for body, fused in ((lambda v: v + 1.0, 1), (body_that_writes, 0)):
        module = torch.fx.GraphModule(torch.nn.Module(), copy_of(graph))
        module.body = make_fx(body, tracing_mode="fake")(randn(6, 16))
        module.v_1 = make_fx(body_that_writes, tracing_mode="fake")(randn(6, 16))  # no argument
        module.register_buffer("constant", randn(1))
        (linear,) = module.graph.find_nodes(op="call_function", target=aten.mm.default)
        value = module.graph.find_nodes(op="placeholder")[2]
        with module.graph.inserting_after(linear):
            call = module.graph.call_function(
                torch.ops.higher_order.invoke_subgraph,
                (module.graph.get_attr("body"), "body", value, module.graph.get_attr("constant")),
            )
            call.meta["val"] = (value.meta["val"],)
        call.prepend(call.args[0])
        call.prepend(call.args[3])
        sites, rejections = find_sites(module.graph)
        assert len(sites) == fused
        assert ["memory is written" in r.reason for r in rejections] == [True] * (1 - fused)


hops = torch.ops.higher_order

BETWEEN: dict[str, tuple[str, Any, tuple[Any, ...], bool]] = {
    "module": ("call_module", "unknown", (), True),
    "method": ("call_method", "relu", (), True),
    "setitem": ("call_function", operator.setitem, (0, 0.0), True),
    "function": ("call_function", operator.getitem, (0,), False),
    "write": ("call_function", aten.zero_.default, (), True),
    "computation": ("call_function", aten.relu.default, (), False),
    "functionalized": ("call_function", hops.auto_functionalized, (aten.zero_.default,), False),
    "functionalized-v2": (
        "call_function", hops.auto_functionalized_v2, (aten.zero_.default,), False
    ),
    "effect": ("call_function", hops.with_effects, (aten.relu.default,), True),
    "called-write": ("call_function", hops.run_and_save_rng_state, (aten.zero_.default,), True),
    "called": ("call_function", hops.run_and_save_rng_state, (aten.relu.default,), False),
    "kernel": ("call_function", hops.triton_kernel_wrapper_mutation, (), True),
    "functional-kernel": ("call_function", hops.triton_kernel_wrapper_functional, (), False),
}  # fmt: skip
"""What stands between linear and multiply, its arguments besides the value, and whether it may
write to memory."""


@pytest.mark.parametrize("keyword", [False, True], ids=["", "keyword"])
@pytest.mark.parametrize("case", BETWEEN.values(), ids=BETWEEN.keys())
def test_what_may_write_is_not_passed(case: Any, keyword: bool) -> None:
    op, target, arguments, writes = case
    inputs = randn(6, 16), randn(1, 16)
    graph = traced(lambda x, w, v: torch.sigmoid(F.linear(x, w)) * v, *inputs)
    (linear,) = graph.find_nodes(op="call_function", target=aten.mm.default)
    value = graph.find_nodes(op="placeholder")[2]
    args = () if keyword else (*arguments, value)
    kwargs = {f"k{i}": a for i, a in enumerate(arguments)} if keyword else {}
    with graph.inserting_after(linear):
        graph.create_node(op, target, args, kwargs)
    sites, rejections = find_sites(graph)
    assert len(sites) == 1 - writes
    assert ["memory is written" in r.reason for r in rejections] == [True] * writes


# --- writes to memory ---------------------------------------------------------------------------


def written(graph: Graph, target: Any, which: int, placeholder: int) -> Graph:
    """The graph with an input zeroed in place after the n-th call of ``target``."""
    node = graph.find_nodes(op="call_function", target=target)[which]
    value = graph.find_nodes(op="placeholder")[placeholder]
    with graph.inserting_after(node):
        write = graph.call_function(aten.zero_.default, (value,))
        write.meta["val"] = value.meta["val"]
    return graph


def check_unchanged(graph: Graph, *inputs: Tensor) -> int:
    """Assert that the pass changes no result and no write; the number of fused gates."""
    results = []
    for run_pass in (False, True):
        if run_pass:
            GateFusionPass()(graph)
        module = torch.fx.GraphModule(torch.nn.Module(), graph)
        given = [t.clone() for t in inputs]
        results.append([*torch.utils._pytree.tree_leaves(module(*given)), *given])
    for before, after in zip(*results):
        torch.testing.assert_close(after, before)
    return sum("gatefuse" in str(n.target) for n in graph.nodes)


def gate_and_add(x: Tensor, w: Tensor, v: Tensor, r: Tensor) -> Tensor:
    return r + torch.sigmoid(F.linear(x, w)) * v


def two_that_wait(x: Tensor, w: Tensor, v: Tensor, u: Tensor) -> Any:
    za, zb = F.linear(x, w), F.linear(u, w)
    return torch.sigmoid(za) * (v + zb), torch.sigmoid(zb) * u, za, zb


@pytest.mark.parametrize(
    "fn, target, which, placeholder",
    [
        pytest.param(gate_and_add, aten.mm.default, 0, 0, id="input-after-linear"),
        pytest.param(gate_and_add, aten.sigmoid.default, 0, 2, id="value-after-sigmoid"),
        pytest.param(gate_and_add, aten.mul.Tensor, 0, 2, id="value-between-mul-and-add"),
        pytest.param(two_that_wait, aten.mul.Tensor, 0, 2, id="value-while-the-op-waits"),
        pytest.param(two_that_wait, aten.mul.Tensor, 0, 0, id="input-while-the-op-waits"),
        pytest.param(two_that_wait, aten.mul.Tensor, 0, 1, id="weight-while-the-op-waits"),
    ],
)
def test_writes_are_not_passed(
    fn: Callable[..., Any], target: Any, which: int, placeholder: int
) -> None:
    inputs = randn(6, 16), randn(1, 16), randn(6, 16), randn(6, 16)
    check_unchanged(written(traced(fn, *inputs), target, which, placeholder), *inputs)


def test_a_write_after_the_first_of_two_conversions() -> None:
    """The op reads what the first one reads."""

    def fn(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        first, second = (x * 2).to(torch.bfloat16), w.to(torch.bfloat16)
        wide = first.float()
        return torch.sigmoid((second.float() * wide).sum(-1, True)) * v

    graph = traced(fn, randn(6, 16), randn(1, 16))
    conversions = graph.find_nodes(op="call_function", target=aten._to_copy.default)
    assert len(find_sites(graph)[0]) == 1
    with graph.inserting_after(conversions[2]):
        graph.call_function(aten.zero_.default, (conversions[0],))
    assert not find_sites(graph)[0]


def test_a_write_before_the_linear_is_not_passed_by_it() -> None:
    def fn(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        return torch.sigmoid(F.linear(torch.tanh(x), w)) * v

    graph = traced(fn, randn(6, 16), randn(1, 16))
    assert len(find_sites(written(graph, aten.tanh.default, 0, 0))[0]) == 1


def test_without_a_write_all_of_these_are_fused() -> None:
    """Or the test above would show nothing."""
    inputs = randn(6, 16), randn(1, 16), randn(6, 16), randn(6, 16)
    assert check_unchanged(traced(gate_and_add, *inputs), *inputs) == 1
    assert check_unchanged(traced(two_that_wait, *inputs), *inputs) == 2


def addend_from_the_logit(x: Tensor, w: Tensor, v: Tensor, r: Tensor) -> Any:
    z = F.linear(x, w)
    return torch.sigmoid(z) * v + (r + z), z, torch.sigmoid(F.linear(r, w)) * v


def test_an_addend_that_depends_on_the_kept_logit_stays_outside() -> None:
    inputs = randn(6, 16), randn(1, 16), randn(6, 16), randn(6, 16)
    graph = traced(addend_from_the_logit, *inputs)
    assert check_unchanged(graph, *inputs) == 2


# --- stretches, and time ------------------------------------------------------------------------


def test_stretches_that_overlap_become_one() -> None:
    stretches = Stretches()
    for low, high in ((10, 20), (40, 50), (60, 70)):
        stretches.add(low, high)
    assert stretches.union(30, 35) == (30, 35)
    assert stretches.union(15, 17) == (10, 20)
    assert stretches.union(18, 45) == (10, 50)
    assert stretches.union(20, 25) == (10, 25)
    assert stretches.union(5, 10) == (5, 20)
    stretches.add(45, 65)
    assert stretches.union(69, 80) == (40, 80)
    assert stretches.union(25, 26) == (25, 26)


def side_by_side(n: int) -> Callable[..., Any]:
    return lambda x, w, v: [torch.sigmoid(F.linear(x, w)) * v for _ in range(n)]


def side_by_side_with_logits(n: int) -> Callable[..., Any]:
    def fn(x: Tensor, w: Tensor, v: Tensor) -> Any:
        logits = [F.linear(x, w) for _ in range(n)]
        return [torch.sigmoid(z) * v for z in logits], logits

    return fn


def in_a_row_with_logits(n: int) -> Callable[..., Any]:
    def fn(x: Tensor, w: Tensor, v: Tensor) -> Any:
        logits = []
        for _ in range(n):
            logits.append(F.linear(x, w))
            x = x + torch.sigmoid(logits[-1]) * v
        return x, logits

    return fn


@pytest.mark.parametrize("make", [side_by_side, side_by_side_with_logits, in_a_row_with_logits])
def test_the_time_of_the_pass_is_linear(make: Callable[[int], Callable[..., Any]]) -> None:
    seconds = []
    for n in (100, 800):
        graph = traced(make(n), randn(6, 16), randn(1, 16), randn(6, 16))
        begin = time.process_time()
        with gatefuse.record():
            sites, _ = find_sites(graph)
            seconds.append(time.process_time() - begin)
        assert len(sites) == n
    assert seconds[1] < 3 * 8 * seconds[0], f"{seconds}: quadratic would be 64 times"


# --- graphs out of order ------------------------------------------------------------------------


def names(graph: Graph) -> list[str]:
    return [node.name for node in graph.nodes]


def gate_beside(x: Tensor, w: Tensor, v: Tensor) -> Any:
    return torch.sigmoid(F.linear(x, w)) * v, x.abs().neg()


def out_of_order(fn: Callable[..., Any], target: Any, *inputs: Tensor) -> Graph:
    """The graph of a function, with one node moved after its users. A pass may leave it so, as one
    of vLLM's does in block FP8."""
    graph = traced(fn, *inputs)
    (node,) = graph.find_nodes(op="call_function", target=target)
    next(iter(graph.find_nodes(op="output"))).prepend(node)
    assert not is_sorted(graph)
    return graph


@pytest.mark.parametrize("target", [aten.abs.default, aten.mm.default, aten.sigmoid.default])
def test_a_graph_out_of_order_is_fused(target: Any) -> None:
    inputs = randn(6, 16), randn(1, 16), randn(6, 16)
    graph = out_of_order(gate_beside, target, *inputs)
    with gatefuse.record() as report:
        GateFusionPass()(graph)
    assert report.fused == 1
    graph.lint()
    results = torch.fx.GraphModule(torch.nn.Module(), graph)(*inputs)
    torch.testing.assert_close(results, gate_beside(*inputs))


def test_a_write_counts_where_it_will_run() -> None:
    """First in the graph, but it uses what follows the linear."""
    inputs = randn(6, 16), randn(1, 16), randn(6, 16)
    graph = traced(gate_beside, *inputs)
    (linear,) = graph.find_nodes(op="call_function", target=aten.mm.default)
    value = graph.find_nodes(op="placeholder")[2]
    value.append(graph.call_function(aten.copy_.default, (value, linear)))
    assert not is_sorted(graph)
    with gatefuse.record() as report:
        GateFusionPass()(graph)
    assert report.fused == 0
    assert "memory is written" in str(report)


def test_a_graph_out_of_order_without_a_sigmoid_is_not_touched() -> None:
    graph = out_of_order(lambda x: x.abs().neg().exp(), aten.abs.default, randn(2))
    before = names(graph)
    GateFusionPass()(graph)
    assert names(graph) == before


def test_a_graph_that_cannot_be_sorted_stays() -> None:
    inputs = randn(6, 16), randn(1, 16), randn(6, 16)
    graph = out_of_order(gate_beside, aten.abs.default, *inputs)
    (last,) = graph.find_nodes(op="call_function", target=aten.neg.default)
    (first,) = graph.find_nodes(op="call_function", target=aten.abs.default)
    first.replace_input_with(first.all_input_nodes[0], last)
    before = names(graph)
    with gatefuse.record() as report:
        GateFusionPass()(graph)
    assert names(graph) == before
    assert report.fused == 0
    assert "left unfused after an error" in str(report)
