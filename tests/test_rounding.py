"""`eager_rounding`, and the one rounding without it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor_config
import torch.nn.functional as F
from torch import Tensor

import gatefuse
from tests.support.comparison import compile_and_compare
from tests.support.forms import (
    H,
    addend_first,
    float_cast_back,
    linear,
    linear_bias,
    logit_returned,
    make_inputs,
    product_sum,
)
from tests.support.judge import assert_identical

BF16 = torch.bfloat16


def _exact_inputs(fn: Callable[..., Any], rows: int = 64) -> tuple[Tensor, ...]:
    """bfloat16 inputs whose products and sums are exact in float32, in any order, and mostly not
    in bfloat16."""
    generator = torch.Generator().manual_seed(3)
    exact = {
        "x": torch.randint(-64, 65, (rows, H), generator=generator),
        "w": torch.randint(-64, 65, (1, H), generator=generator) / 8192,
    }
    inputs = zip(inspect.signature(fn).parameters, make_inputs(fn, lead=(rows,)), strict=True)
    return tuple(exact.get(name, t).to(BF16) for name, t in inputs)


def gate_widened(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(F.linear(x, w)).float() * v.float()


def gate_widened_and_back(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return gate_widened(x, w, v).to(v.dtype)


def logit_narrowed(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(F.linear(x.float(), w.float()).to(v.dtype)) * v


def bias_wider(x: Tensor, w: Tensor, v: Tensor, b: Tensor) -> Tensor:
    return torch.sigmoid(F.linear(x, w) + b.float()).to(v.dtype) * v


ROUNDED = (
    linear,
    addend_first,
    linear_bias,
    bias_wider,
    product_sum,
    float_cast_back,
    logit_returned,
    gate_widened,
    gate_widened_and_back,
    logit_narrowed,
)


@pytest.mark.parametrize("how", ["option", "inductor"])
@pytest.mark.parametrize("fn", ROUNDED, ids=lambda fn: fn.__name__)
def test_eager_rounding_is_bit_identical_to_eager(fn: Callable[..., Any], how: str) -> None:
    inputs = _exact_inputs(fn)
    with inductor_config.patch(emulate_precision_casts=how == "inductor"):
        result = compile_and_compare(fn, inputs, options={"eager_rounding": how == "option"})
    assert result.report.fused == 1
    assert_identical(result.fused, result.eager)


@pytest.mark.parametrize("rows", [1, 64])
def test_eager_rounding_of_a_decomposed_product(rows: int) -> None:
    """Coordinate descent, and one row on the CPU, make a float32 sum of the linear."""
    for fn in (addend_first, gate_widened):
        result = compile_and_compare(
            fn,
            _exact_inputs(fn, rows),
            options={"eager_rounding": True},
            coordinate_descent=rows > 1,
        )
        assert result.report.fused == 1
        assert_identical(result.fused, result.eager)


def test_without_eager_rounding_the_result_is_rounded_once() -> None:
    inputs = _exact_inputs(addend_first)
    eager = addend_first(*inputs)
    reference = addend_first(*(t.double() for t in inputs))
    with torch.no_grad(), gatefuse.fusing():
        fused = torch.compile(addend_first)(*inputs)
    assert not torch.equal(fused, eager)
    assert (fused.double() - reference).norm() < (eager.double() - reference).norm()
    # One rounding: the nearest bfloat16 to the truth, up to ties that float32 arithmetic decides.
    assert (fused != reference.to(BF16)).double().mean() < 0.01
