"""What the choice of a placement asks of a gate's neighbours."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor_config
from torch import Tensor
from torch._inductor import ir
from torch._inductor.lowering import fallbacks, lowerings
from torch.fx import Graph, Node

import gatefuse
from gatefuse.inductor import cost_model, lowering
from gatefuse.inductor.fusion_pass import GateFusionPass
from tests.support.forms import linear, make_inputs
from tests.support.graphs import post_grad_graph
from tests.test_spellings import by_exp, operands

aten = torch.ops.aten
Steps = list[tuple[Any, ...]]


def chain(*targets: Any) -> tuple[Graph, list[Node]]:
    """Functions of one another, the first of an input of the graph, the last an output."""
    graph = Graph()
    nodes = [graph.placeholder("x")]
    for target in targets:
        nodes.append(graph.call_function(target, (nodes[-1],)))
    graph.output((nodes[-1],))
    return graph, nodes


OPAQUE: dict[str, tuple[list[Any], bool]] = {
    "nothing": ([], True),
    "matmul": ([aten.mm.default], True),
    "view": ([aten.view.default], True),
    "matmul-view": ([aten.mm.default, aten.view.default], True),
    "relu": ([aten.relu.default], False),
    "relu-view": ([aten.relu.default, aten.view.default, aten.slice.Tensor], False),
    "collective": ([torch.ops._c10d_functional.all_reduce.default], True),
    "copy": ([aten.copy_.default], True),
    "branch": ([torch.ops.higher_order.cond], True),
}


@pytest.mark.parametrize(("targets", "opaque"), OPAQUE.values(), ids=OPAQUE.keys())
def test_what_inductor_computes(targets: list[Any], opaque: bool) -> None:
    lowering.register()
    _, nodes = chain(*targets)
    assert cost_model._computed_by_inductor(nodes[-1]) == (not opaque)
    _, nodes = chain(aten.tanh.default, *reversed(targets))
    user = cost_model._fusible_user(nodes[1])
    assert (user is None) == opaque
    assert opaque or (user is not None and user.target is aten.relu.default)


def test_results_of_an_op_with_two() -> None:
    _, nodes = chain(aten.tanh.default, operator.getitem, aten.relu.default)
    assert cost_model._fusible_user(nodes[1]) is nodes[3]
    _, nodes = chain(aten.tanh.default, operator.neg, aten.relu.default)
    assert cost_model._fusible_user(nodes[1]) is None


@torch.library.custom_op("gatefuse_tests::opaque", mutates_args=())
def opaque(x: Tensor) -> Tensor:
    return x.clone()


def test_operators_that_are_called() -> None:
    lowering.register()
    called = next(op for op in fallbacks if isinstance(op, torch._ops.OpOverload))
    assert called in lowerings
    for op in (
        called,
        torch.ops.gatefuse_tests.opaque.default,
        torch.ops.gatefuse.linear_sigmoid_mul.default,
    ):
        assert cost_model.is_opaque(op)


def _buffers() -> dict[str, Any]:
    device, dtype = torch.device("cpu"), torch.float32
    layout = ir.FixedLayout(device, dtype, [4], [1])
    loops = ir.Pointwise(device=device, dtype=dtype, inner_fn=lambda index: index, ranges=[4])
    computed = ir.ComputedBuffer(name="c", layout=layout, data=loops)
    given = ir.InputBuffer(name="x", layout=layout)
    box: Callable[[Any], Any] = lambda data: ir.TensorBox(ir.StorageBox(data))  # noqa: E731
    return {"loops": box(loops), "computed": box(computed), "given": box(given)}


PLACEMENTS: list[tuple[dict[str, Any], tuple[str, str]]] = [
    ({}, ("kernel", "all neighbours are opaque to Inductor")),
    ({"input": "loops"}, ("inline", "the input is made by")),
    ({"value": "computed"}, ("inline", "the value is made by")),
    ({"addend": "loops"}, ("inline", "the addend is made by")),
    ({"addend": "given"}, ("kernel", "all neighbours")),
    ({"used": True}, ("inline", "the result goes into aten.relu")),
    ({"wanted": "inline"}, ("inline", "forced by option")),
    ({"wanted": "kernel", "input": "loops"}, ("kernel", "forced by option")),
    ({"kernel_problem": "no GPU"}, ("inline", "no GPU")),
    ({"kernel_problem": "no GPU", "wanted": "kernel"}, ("inline", "kernel was forced, but no GPU")),
    ({"kernel_problem": "no GPU", "wanted": "inline"}, ("inline", "no GPU")),
]


@pytest.mark.parametrize(("case", "expected"), PLACEMENTS)
def test_placement(case: dict[str, Any], expected: tuple[str, str]) -> None:
    given = {"input": "given", "value": "given", "wanted": "auto", "kernel_problem": None} | case
    buffers = _buffers() | {None: None}
    targets = [aten.tanh.default] + [aten.relu.default] * bool(given.get("used"))
    placement, why = cost_model.choose_placement(
        chain(*targets)[1][1],
        input=buffers[given["input"]],
        value=buffers[given["value"]],
        addend=buffers[given.get("addend")],
        wanted=given["wanted"],
        kernel_problem=given["kernel_problem"],
    )
    assert placement == expected[0]
    assert why.startswith(expected[1])


def reasons(graph: Graph, **options: Any) -> list[str]:
    with gatefuse.record() as report:
        GateFusionPass(gatefuse.Options(**options))(graph)
    return [r.reason for r in report.rejections]


@pytest.mark.parametrize("how", ["", "option", "batch_invariant", "deterministic"])
def test_the_number_of_rows_decides_nothing_where_it_must_not(
    monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    if how not in ("", "option") and not hasattr(inductor_config, how):
        pytest.skip(f"this PyTorch has no {how}")
    monkeypatch.setitem(cost_model.LARGE_RESULT, 4, 4)

    def fn(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        return linear(torch.tanh(x), w, v)

    graph = post_grad_graph(fn, make_inputs(fn))
    with inductor_config.patch({how: True} if how not in ("", "option") else {}):
        found = reasons(graph, batch_invariant=how == "option")
    assert ["size on the CPU" in r for r in found] == [True] * (how == "")


@pytest.mark.parametrize("how", ["", "option", "emulate_precision_casts"])
def test_eagers_rounding_is_known_of_a_sigmoid_only(how: str) -> None:
    graph = post_grad_graph(by_exp, operands())
    with inductor_config.patch(emulate_precision_casts=how == "emulate_precision_casts"):
        found = reasons(graph, eager_rounding=how == "option")
    assert ["written as a sigmoid only" in r for r in found] == [True] * (how != "")
