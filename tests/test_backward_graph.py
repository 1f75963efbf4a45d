"""The gradients of a gate in the graph of a backward: rewritten on a GPU, right, and told of.

On the CPU Inductor's own stay, so the tests that compute with rewritten ones ask for them.
"""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gatefuse
from gatefuse.bench.workloads import call, make_set
from gatefuse.inductor import gradient_rewriter
from gatefuse.inductor.choices import GRADIENT_KEY
from gatefuse.records import GradientReport
from gatefuse.summary import gradients_as_text
from tests.support.cuda_codegen import cuda_codegen, local_memory, on_cuda
from tests.support.cuda_rewrites import emulate_coordinate_descent
from tests.support.gradients import BackwardGraph, rewritten_gradients
from tests.support.graphs import capture_post_grad

aten = torch.ops.aten
BF16 = torch.bfloat16


class Gate(nn.Module):
    """A gate whose input another linear reads too, so that its gradient is a sum."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(32, 1, bias=bias)
        self.other = nn.Linear(32, 24)

    def forward(self, x: Tensor, routed: Tensor) -> Tensor:
        return F.sigmoid(self.gate(x)) * self.other(x) + routed


class TwoGates(nn.Module):
    """Two gates of one input, whose gradient adds a product to the other."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(32, 1, bias=False)
        self.second = nn.Linear(32, 1, bias=False)

    def forward(self, x: Tensor, routed: Tensor) -> Tensor:
        return F.sigmoid(self.gate(x)) * routed.square() + F.sigmoid(self.second(x)) * routed


class Squeezed(Gate):
    def forward(self, x: Tensor, routed: Tensor) -> Tensor:
        gate = F.sigmoid(self.gate(x).squeeze(-1))
        return gate.unsqueeze(-1) * self.other(x) + routed


class Checkpointed(Gate):
    def forward(self, x: Tensor, routed: Tensor) -> Tensor:
        inside = super().forward
        out: Any = checkpoint(lambda x, r: inside(x, r).square(), x, routed, use_reentrant=False)
        return out


def run(
    model: nn.Module,
    lead: tuple[int, ...],
    *,
    forced: bool = True,
    tuning: bool = False,
    dynamic: bool | None = False,
    coordinate_descent_tuning: bool = False,
    **options: Any,
) -> list[GradientReport]:
    """Gradients within the tolerance of the compiled model, and what is said of them."""
    dtype = model.gate.weight.dtype
    x, routed = torch.randn(*lead, 32), torch.randn(*lead, 24)
    seed = torch.randn(*lead, 24)
    leaves = [t.to(dtype).requires_grad_() for t in (x, routed)]

    def gradients(function: Any, model: nn.Module, leaves: list[Tensor]) -> list[Tensor]:
        out = function(*leaves)
        wanted = [*leaves, *(p for p in model.parameters() if p.requires_grad)]
        return list(torch.autograd.grad(out, wanted, seed.to(out.dtype)))

    torch._dynamo.reset()
    with contextlib.ExitStack() as stack:
        stack.enter_context(rewritten_gradients(forced))
        if tuning:
            stack.enter_context(emulate_coordinate_descent())
        report = stack.enter_context(gatefuse.fusing(**options))
        with torch._inductor.config.patch(coordinate_descent_tuning=coordinate_descent_tuning):
            got = gradients(torch.compile(model, dynamic=dynamic), model, leaves)
    exact = copy.deepcopy(model).double()
    wide = [t.detach().double().requires_grad_() for t in leaves]
    eager, reference = gradients(model, model, leaves), gradients(exact, exact, wide)
    for g, e, r in zip(got, eager, reference, strict=True):
        eps = torch.finfo(dtype).eps * r.abs()
        error, allowed = (g.double() - r).abs(), (e.double() - r).abs()
        assert (g.dtype, g.stride()) == (e.dtype, e.stride())
        assert error.norm() <= 2 * allowed.norm() + eps.norm()
        assert error.max() <= 2 * allowed.max() + eps.max()
    fused = sum(g.fused for g in report.graphs if g.phase == "forward")
    assert fused == sum(m.out_features == 1 for m in model.children())
    return [g for graph in report.graphs for g in graph.gradients]


def columns(graph: torch.fx.Graph) -> list[torch.fx.Node]:
    """Matrix products of a column, which is the input's gradient by the library."""
    products = [*graph.find_nodes(op="call_function", target=aten.mm.default)]
    products += graph.find_nodes(op="call_function", target=aten.addmm.default)
    return [n for n in products if n.args[-2].meta["val"].shape[1] == 1]


PRODUCT, LIBRARY = "an elementwise product, which Inductor fuses", "a matrix product"


@pytest.mark.parametrize(
    "lead, dtype, bias, options",
    [
        ((20,), torch.float32, True, {}),
        ((4, 5), BF16, False, {}),
        ((1,), torch.float32, False, {}),
        ((6,), torch.float32, False, {"dynamic": True}),
    ],
)
def test_the_inputs_gradient_is_an_elementwise_product(lead, dtype, bias, options):
    (found,) = run(Gate(bias).to(dtype), lead, **options)
    assert found.input == PRODUCT
    assert found.weight == (LIBRARY if lead != (1,) else None)
    assert found.rewritten == (1 if lead != (1,) else 2)
    assert not found.reason
    assert found.location.startswith("test_backward_graph.py:")


def test_of_a_logit_without_a_column() -> None:
    (found,) = run(Squeezed(), (20,))
    assert (found.input, found.weight, found.rewritten) == (PRODUCT, LIBRARY, 1)


@pytest.mark.timeout(150)  # an erased node in the graph's list is an endless loop
@pytest.mark.parametrize("lead", [(20,), (1,)])
def test_two_gates_of_one_input(lead: tuple[int, ...]) -> None:
    """What becomes of one gate's gradients changes the other's."""
    found = run(TwoGates(), lead)
    assert [g.input for g in found] == [PRODUCT] * 2
    assert not any(g.reason for g in found)


def test_where_inductor_tunes() -> None:
    (found,) = run(Gate().to(BF16), (20,), tuning=True, coordinate_descent_tuning=True)
    assert (found.rewritten, found.weight) == (0, "elementwise")
    assert found.reason == "where Inductor tunes, its own are not slower"


def test_generated_code_adds_the_product():
    """Not the library, which would read it from memory, as in PyTorch 2.13 and later."""
    backward = BackwardGraph()
    a, b = backward.inputs["a"], backward.inputs["b"]
    product = backward.call(aten.mul.Tensor, backward.dz, backward.inputs["w"])
    (found,) = backward.rewrite(backward.call(aten.addmm.default, product, a, b))
    assert (found.rewritten, found.reason) == (1, "")
    assert not backward.graph.find_nodes(op="call_function", target=aten.addmm.default)
    (library,) = backward.graph.find_nodes(op="call_function", target=aten.mm.default)
    assert library.args == (a, b)
    assert {*backward.graph.output_node().args[0][0].args} == {library, product}


@pytest.mark.parametrize("scale", ["alpha", "beta"])
def test_a_scaled_product_is_left_alone(scale: str) -> None:
    backward = BackwardGraph()
    grad, w = backward.inputs["grad"], backward.inputs["w"]
    scaled = backward.call(aten.addmm.default, grad, backward.dz, w, **{scale: 2})
    (found,) = backward.rewrite(scaled)
    assert (found.rewritten, found.reason) == (0, "the product is scaled")
    assert backward.graph.output_node().args[0] == (scaled,)


def test_padded_rows() -> None:
    """As Inductor pads on a GPU where it measures that to be faster."""
    backward = BackwardGraph()
    dz = backward.call(aten.constant_pad_nd.default, backward.dz, [0, 0, 0, 7], 0.0)
    product = backward.call(aten.mm.default, dz, backward.inputs["w"])
    result = backward.call(aten.slice.Tensor, product, 0, 0, -7)
    (found,) = backward.rewrite(result)
    assert (found.input, found.rewritten, found.reason) == (PRODUCT, 1, "")
    assert (result.args[0].target, result.args[0].args) == (
        aten.mul.Tensor,
        (dz, backward.inputs["w"]),
    )
    assert result.args[0].meta["val"].shape == (16, 32)
    assert result.args[0].meta[GRADIENT_KEY]


def test_a_product_padded_in_between_is_left_alone() -> None:
    backward = BackwardGraph()
    dz = backward.call(aten.constant_pad_nd.default, backward.dz, [0, 7], 0.0)
    w = backward.call(aten.constant_pad_nd.default, backward.inputs["w"], [0, 0, 0, 7], 0.0)
    product = backward.call(aten.mm.default, dz, w)
    (found,) = backward.rewrite(product)
    assert (found.input, found.rewritten) == (LIBRARY, 0)
    assert found.reason == "the product is padded"
    assert backward.graph.output_node().args[0] == (product,)


@pytest.mark.parametrize("draws", [1, 2])
def test_among_several_random_draws_it_is_left_alone(draws: int) -> None:
    """Other kernels might draw in another order."""
    backward = BackwardGraph()
    drawn = [backward.call(aten.rand_like.default, backward.inputs["z"]) for _ in range(draws)]
    product = backward.call(aten.mm.default, backward.dz, backward.inputs["w"])
    (found,) = backward.rewrite(product, *drawn)
    several = "random numbers are drawn more than once in this graph"
    assert (found.rewritten, found.reason) == ((1, "") if draws == 1 else (0, several))


def test_recomputed_in_the_backward():
    (found,) = run(Checkpointed(), (20,))
    assert (found.input, found.weight, found.reason) == (PRODUCT, LIBRARY, "")


def test_of_frozen_parameters_nothing_is_computed():
    model = Gate()
    model.gate.requires_grad_(False)
    (found,) = run(model, (20,))
    assert (found.input, found.weight) == (PRODUCT, None)


def test_left_alone():
    (found,) = run(Gate(), (20,), forced=False)
    assert (found.rewritten, found.reason) == (0, "on the CPU Inductor's own are not slower")
    (found,) = run(Gate(), (20,), eager_rounding=True)
    assert (found.rewritten, found.reason) == (0, "eager rounding was asked for")


def test_of_other_sigmoids_nothing_is_said():
    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(32, 1)

        def forward(self, x: Tensor) -> Tensor:
            return F.sigmoid(self.gate(x))

    with gatefuse.fusing() as report:
        torch.compile(Router())(torch.randn(5, 32, requires_grad=True)).sum().backward()
    assert not [g for graph in report.graphs for g in graph.gradients]


def layouts(graph: torch.fx.Graph) -> list[Any]:
    results = [n.meta["val"] for n in graph.output_node().args[0] if n is not None]
    return [(t.dtype, t.shape, t.stride()) for t in results]


def test_in_the_graph():
    """No library product of a column is left; inputs, outputs and their layout are the same."""
    with capture_post_grad() as graphs:
        out = torch.compile(Gate(), dynamic=False)(torch.randn(9, 32, requires_grad=True), 1.0)
        out.sum().backward()
    graph = graphs[1]
    assert len(columns(graph)) == 1
    before = layouts(graph)
    keep = mock.patch.object(gradient_rewriter, "reason_to_keep_gradients", return_value=None)
    with keep:
        gradient_rewriter.rewrite_gradients(graph, gatefuse.Options())
    graph.lint()
    assert not columns(graph)
    assert layouts(graph) == before
    # Seen again, there is nothing left to do.
    with keep:
        (again,) = gradient_rewriter.rewrite_gradients(graph, gatefuse.Options())
    assert (again.rewritten, again.input) == (0, "elementwise")


def test_an_error_leaves_the_graph_as_it_was():
    with capture_post_grad() as graphs:
        torch.compile(Gate(), dynamic=False)(
            torch.randn(9, 32, requires_grad=True), 1.0
        ).sum().backward()
    graph = graphs[1]
    before = str(graph)
    with (
        mock.patch.object(gradient_rewriter, "reason_to_keep_gradients", return_value=None),
        mock.patch.object(gradient_rewriter, "check_same", side_effect=ValueError("not the same")),
    ):
        for found in gradient_rewriter.rewrite_gradients(graph, gatefuse.Options()):
            assert found.rewritten == 0
    assert str(graph) == before


@pytest.mark.parametrize("H", [2048, 8192])
def test_on_a_gpu_rows_of_the_backward_stay_in_registers(H: int, tmp_path: Path) -> None:
    """Where the gate's sum over the row is the only one; the library adds nothing in the glue."""
    for workload in ("mul-training", "glue-training"):
        module, inputs = make_set(workload, H, 4, BF16, "cpu")
        with capture_post_grad() as graphs:
            module.step(torch.compile(call, dynamic=False), *inputs)
        graph = graphs[-1]
        values = [n.meta["val"] for n in graph.nodes if n.op == "placeholder"]
        backward = torch.fx.GraphModule(nn.Module(), graph)
        torch._dynamo.reset()
        with cuda_codegen() as generated, gatefuse.record() as report, torch.no_grad():
            on_gpu = [
                on_cuda(torch.empty_strided(v.shape, v.stride(), dtype=v.dtype)) for v in values
            ]
            torch.compile(backward, dynamic=False, options=gatefuse.options())(*on_gpu)
        (found,) = [g for graph in report.graphs for g in graph.gradients]
        assert not found.reason
        code = generated.code
        assert "extern_kernels.addmm" not in code.launches
        if workload == "mul-training":
            (rows,) = (name for name in code.kernels if name.startswith("triton_per"))
            assert local_memory(code, rows, tmp_path) == 0


def test_a_gate_without_its_linear_is_told_of() -> None:
    """After a graph break the logit is an input, and its gradient is all that the graph has."""
    alone = GradientReport("mul_1", None, None, None, reason="because")
    found = gradients_as_text(alone)
    assert found == "neither the input's nor the weight's is in this graph (because)"
