"""What is a gate's gradient and what only looks like one; what of it is rewritten."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch._inductor.choices import InductorChoices
from torch._inductor.virtualized import V
from torch.fx import Node

from gatefuse.inductor import choices
from tests.support.gradients import BackwardGraph

aten = torch.ops.aten
Make = Callable[[BackwardGraph], Node]

#: ``dz``, with one thing other than in the gradient of a sigmoid times a sum over the row.
LOOKALIKES: dict[str, Make] = {
    "two-minus-gate": lambda b: b.mul(b.row_sum, b.mul(b.gate, b.call(aten.sub.Tensor, 2, b.gate))),
    "one-minus-two-gates": lambda b: b.mul(
        b.row_sum, b.mul(b.gate, b.call(aten.sub.Tensor, 1, b.gate, alpha=2))
    ),
    "gate-minus-one": lambda b: b.mul(b.row_sum, b.mul(b.gate, b.call(aten.sub.Tensor, b.gate, 1))),
    "gate-plus-complement": lambda b: b.mul(
        b.row_sum, b.call(aten.add.Tensor, b.gate, b.complement)
    ),
    "another-gate": lambda b: b.mul(
        b.row_sum, b.mul(b.call(aten.sigmoid.default, b.row_sum), b.complement)
    ),
    "row-sum-plus-slope": lambda b: b.call(aten.add.Tensor, b.row_sum, b.slope),
    "largest-of-the-row": lambda b: b.mul(b.call(aten.amax.default, b.product, [1], True), b.slope),
    "sum-of-columns": lambda b: b.mul(b.call(aten.sum.dim_IntList, b.product, [0], True), b.slope),
    "sum-of-all": lambda b: b.mul(b.call(aten.sum.dim_IntList, b.product, [0, 1], True), b.slope),
    "sum-of-unnamed": lambda b: b.mul(b.call(aten.sum.dim_IntList, b.product, None, True), b.slope),
    "row-of-sums": lambda b: b.mul(
        b.call(
            aten.sum.dim_IntList,
            b.call(aten.add.Tensor, b.inputs["grad"], b.inputs["v"]),
            [1],
            True,
        ),
        b.slope,
    ),
    "row-of-squares": lambda b: b.mul(
        b.call(aten.sum.dim_IntList, b.mul(b.inputs["v"], b.inputs["v"]), [1], True), b.slope
    ),
    "no-row-sum": lambda b: b.mul(b.inputs["z"], b.slope),
}


@pytest.mark.parametrize("name", LOOKALIKES)
def test_what_only_looks_like_a_gradient(name: str) -> None:
    backward = BackwardGraph()
    dz = LOOKALIKES[name](backward)
    factor = backward.input("factor", dz.meta["val"].shape[1], 32)
    product = backward.call(aten.mm.default, dz, factor)
    assert backward.rewrite(product) == []
    assert backward.graph.output_node().args[0] == (product,)


SAME: dict[str, Make] = {
    "plain": lambda b: b.dz,
    "by-rsub": lambda b: b.mul(b.row_sum, b.mul(b.gate, b.call(aten.rsub.Scalar, b.gate, 1))),
    "reshaped-gate": lambda b: b.mul(
        b.row_sum,
        b.mul(
            b.gate,
            b.call(aten.sub.Tensor, 1, b.call(aten.reshape.default, b.gate, [9, 1])),
        ),
    ),
    "converted-product": lambda b: b.mul(
        b.call(
            aten.sum.dim_IntList,
            b.call(torch.ops.prims.convert_element_type.default, b.product, torch.float32),
            [-1],
            True,
        ),
        b.slope,
    ),
    "reshaped-sum": lambda b: b.mul(
        b.call(aten.reshape.default, b.call(aten.sum.dim_IntList, b.product, [1], False), [9, 1]),
        b.slope,
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_other_spellings(name: str) -> None:
    backward = BackwardGraph()
    dz = SAME[name](backward)
    product = backward.call(aten.mm.default, dz, backward.inputs["w"])
    (found,) = backward.rewrite(product)
    assert (found.rewritten, found.reason) == (1, "")
    assert not backward.graph.find_nodes(op="call_function", target=aten.mm.default)


def test_only_a_product_of_the_column_from_the_left_is_the_inputs_gradient() -> None:
    """As the right factor the column is multiplied with a matrix."""
    backward = BackwardGraph()
    product = backward.call(aten.mm.default, backward.input("c", 4, 9), backward.dz)
    (found,) = backward.rewrite(product)
    assert (found.input, found.weight, found.rewritten) == (None, None, 0)


def test_only_a_product_of_one_row_is_the_weights_gradient() -> None:
    backward = BackwardGraph()
    square = backward.call(aten.reshape.default, backward.dz, [3, 3])
    other = backward.call(aten.mm.default, square, backward.input("c", 3, 5))
    (found,) = backward.rewrite(other)
    assert (found.input, found.weight) == (None, None)

    backward = BackwardGraph()
    row = backward.call(aten.permute.default, backward.dz, [1, 0])
    (found,) = backward.rewrite(backward.call(aten.mm.default, row, backward.inputs["a"]))
    assert (found.input, found.weight) == (None, "a matrix product")


def three_dimensions(b: BackwardGraph, product: Node) -> Node:
    batched = b.call(aten.reshape.default, product, [1, 9, 32])
    return b.call(aten.baddbmm.default, batched, b.input("c", 1, 9, 4), b.input("d", 1, 4, 32))


SUMS: dict[str, Callable[[BackwardGraph, Node], Node]] = {
    "as-a-factor": lambda b, p: b.call(aten.addmm.default, b.inputs["a"], p, b.input("c", 32, 4)),
    "alpha": lambda b, p: b.call(aten.addmm.default, p, b.inputs["a"], b.inputs["b"], alpha=2),
    "beta": lambda b, p: b.call(aten.addmm.default, p, b.inputs["a"], b.inputs["b"], beta=2),
    "batched": three_dimensions,
}


@pytest.mark.parametrize("name", SUMS)
def test_sums_that_stay_the_librarys(name: str) -> None:
    backward = BackwardGraph()
    product = backward.mul(backward.dz, backward.inputs["w"])
    added = SUMS[name](backward, product)
    (found,) = backward.rewrite(added)
    assert (found.rewritten, found.reason) == (0, "")
    assert backward.graph.output_node().args[0] == (added,)


@pytest.mark.parametrize(
    "setting", ["coordinate_descent_tuning", "max_autotune", "max_autotune_gemm"]
)
def test_in_each_way_of_tuning_gradients_are_left_alone(setting: str) -> None:
    backward = BackwardGraph()
    product = backward.call(aten.mm.default, backward.dz, backward.inputs["w"])
    with torch._inductor.config.patch({setting: True}):
        (found,) = backward.rewrite(product)
    assert (found.rewritten, found.reason) == (0, "where Inductor tunes, its own are not slower")


@pytest.mark.parametrize("asked", ["option", "inductor"])
def test_the_first_reason_is_given(asked: str) -> None:
    """Eager rounding keeps them, whatever else would."""
    backward = BackwardGraph()
    drawn = [backward.call(aten.rand_like.default, backward.inputs["z"]) for _ in range(2)]
    product = backward.call(aten.mm.default, backward.dz, backward.inputs["w"])
    with torch._inductor.config.patch(emulate_precision_casts=asked == "inductor"):
        (found,) = backward.rewrite(product, *drawn, eager_rounding=asked == "option")
    assert (found.rewritten, found.reason) == (0, "eager rounding was asked for")


def test_rows_with_a_rewritten_gradient_are_gatefuses_choice() -> None:
    backward = BackwardGraph()
    product = backward.call(aten.mm.default, backward.dz, backward.inputs["w"])
    with V.set_choices_handler(InductorChoices()):
        backward.rewrite(product)
        assert isinstance(V.choices, choices._GateChoices)
