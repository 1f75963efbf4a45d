"""What must be left alone: not one bit of the output changes, and the report says why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.comparison import compile_and_compare
from tests.support.forms import H, linear
from tests.support.graphs import op_nodes

HEADS = 4


def elementwise_gate(x: Tensor, w_full: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(F.linear(x, w_full)) * v


def elementwise_gate_on_width_one(x: Tensor, w: Tensor, v1: Tensor) -> Tensor:
    return torch.sigmoid(F.linear(x, w)) * v1


def affine_logit(x: Tensor, w: Tensor, v: Tensor, s: Tensor, b: Tensor) -> Tensor:
    """Hyper-connections: scale and offset between logit and sigmoid, an epsilon behind it."""
    return (torch.sigmoid(F.linear(x, w) * s + b) + 1e-6) * v


def scaled_logit(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(F.linear(x, w) * 0.5) * v


def shifted_logit(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(F.linear(x, w) - 1.0) * v


def negated_logit(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(-F.linear(x, w)) * v


def clamped_logit(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(F.linear(x, w).clamp(-3, 3)) * v


def nonlinear_logit(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(torch.tanh(F.linear(x, w))) * v


def max_logit(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid((x * w).amax(-1, keepdim=True)) * v


def mean_logit(x: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(x.sum(-1, keepdim=True)) * v


def bilinear_logit(x: Tensor, v: Tensor) -> Tensor:
    """Two rows multiplied: neither factor is one row of weights."""
    return torch.sigmoid((x * v).sum(-1, keepdim=True)) * v


def sum_over_rows(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid((x * w).sum(0, keepdim=True)) * v


def logit_is_input(z: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(z) * v


def gate_plus_epsilon(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return (torch.sigmoid(F.linear(x, w)) + 1e-3) * v


def gate_scaled(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return (torch.sigmoid(F.linear(x, w)) * 2.0) * v


def gate_squared(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    gate = torch.sigmoid(F.linear(x, w))
    return (gate * gate) * v


def gate_divides(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return v / torch.sigmoid(F.linear(x, w))


def lerp(x: Tensor, w: Tensor, v: Tensor, r: Tensor) -> Tensor:
    gate = torch.sigmoid(F.linear(x, w))
    return torch.lerp(r, v, gate)


def lerp_written_out(x: Tensor, w: Tensor, v: Tensor, r: Tensor) -> Tensor:
    gate = torch.sigmoid(F.linear(x, w))
    return gate * v + (1 - gate) * r


def one_gate_for_several_heads(x3: Tensor, w: Tensor, v_heads: Tensor) -> Tensor:
    gate = torch.sigmoid(F.linear(x3, w))
    return v_heads * gate.unsqueeze(-1)


def wider_than_value(x3: Tensor, w: Tensor, v4: Tensor) -> Tensor:
    """[B, S, 1, H] * [B, S, hc, 1]: the product is wider than the value, and than the gate."""
    gate = torch.sigmoid(F.linear(x3, w))
    return v4 * gate.unsqueeze(-2).expand(-1, -1, 3, -1)


def value_broadcast_over_rows(x: Tensor, w: Tensor, norm: Tensor) -> Tensor:
    return torch.sigmoid(F.linear(x, w)) * norm


def gate_broadcast_over_rows(x3: Tensor, w: Tensor, v3: Tensor) -> Tensor:
    """One gate per sequence, from its first token, on all of its tokens."""
    return torch.sigmoid(F.linear(x3[:, :1], w)) * v3


def transposed_rows(x_square: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """The gates as a row: gate j scales column j."""
    return torch.sigmoid(F.linear(x_square, w)).t() * v


def per_head_gate(x: Tensor, w_heads: Tensor, v: Tensor) -> Tensor:
    gate = torch.sigmoid(F.linear(x, w_heads)).unsqueeze(-1)
    return (v.view(-1, HEADS, H // HEADS) * gate).flatten(1)


def router(x: Tensor, w_heads: Tensor) -> tuple[Tensor, Tensor]:
    """A sigmoid router: top-k of the scores, no multiply with a row of values."""
    scores = torch.sigmoid(F.linear(x, w_heads))
    weights, indices = scores.topk(2, dim=-1)
    return weights / weights.sum(-1, keepdim=True), indices


def gate_only(x: Tensor, w: Tensor) -> Tensor:
    return torch.sigmoid(F.linear(x, w))


def softplus_gate(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return F.softplus(F.linear(x, w)) * v


def tanh_gate(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return torch.tanh(F.linear(x, w)) * v


def silu_mlp(x: Tensor, w_full: Tensor, v: Tensor) -> Tensor:
    return F.silu(F.linear(x, w_full)) * v


def delta_net_beta(x3: Tensor, w_heads: Tensor, v3: Tensor) -> Tensor:
    """A DeltaNet beta: one sigmoid per head, on keys and values of that head."""
    beta = torch.sigmoid(F.linear(x3, w_heads)).transpose(1, 2).unsqueeze(-1)
    v = v3.view(2, 3, HEADS, H // HEADS).transpose(1, 2)
    return v * beta


def batched_weights(x3: Tensor, w_batch: Tensor, v3: Tensor) -> Tensor:
    """One row of weights per batch element."""
    return torch.sigmoid(torch.bmm(x3, w_batch)) * v3


def bias_per_row(x: Tensor, w: Tensor, v: Tensor, z: Tensor) -> Tensor:
    return torch.sigmoid(F.linear(x, w) + z) * v


def two_linears(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(F.linear(x, w) + F.linear(v, w)) * v


def scaled_addmm(x: Tensor, w: Tensor, v: Tensor, b: Tensor) -> Tensor:
    return torch.sigmoid(torch.addmm(b, x, w.t(), beta=0.5, alpha=2.0)) * v


def second_of_two_columns(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid((x @ torch.cat([w, 2 * w]).t())[:, 1:]) * v


def padded_in_front(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """The product's first column is the padding."""
    return torch.sigmoid((x @ F.pad(w.t(), [1, 7]))[:, :-8]) * v


def every_second_row(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(F.linear(x, w)[::2]) * v[:3]


def integer_value(x: Tensor, w: Tensor, n: Tensor) -> Tensor:
    return torch.sigmoid(F.linear(x, w)) * n


def integer_logit(n: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(n.sum(-1, keepdim=True)) * v


def complex_value(x: Tensor, w: Tensor, c: Tensor) -> Tensor:
    return torch.view_as_real(torch.sigmoid(F.linear(x, w)) * c)


def value_from_logit(x: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The value depends on the logit, and the logit leaves the graph: no order works."""
    z = F.linear(x, w)
    return torch.sigmoid(z) * (v + z), z


def dropout_gate(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return F.dropout(torch.sigmoid(F.linear(x, w)), 0.5, training=True) * v


_SHAPES: dict[str, tuple[int, ...]] = {
    "x": (5, H), "v": (5, H), "r": (5, H), "w": (1, H), "b": (1,), "s": (1,), "z": (5, 1),
    "v1": (5, 1), "norm": (H,), "w_full": (H, H), "w_heads": (HEADS, H), "x_square": (H, H),
    "x3": (2, 3, H), "v3": (2, 3, H), "v4": (2, 3, 1, H), "v_heads": (2, 3, HEADS, 16),
    "w_batch": (2, H, 1), "n": (5, H), "c": (5, H),
}  # fmt: skip


@dataclass(frozen=True)
class Negative:
    """fn: left alone. reason: part of what the report says of each candidate. candidates: sigmoids
    in it, each of which must be rejected."""

    id: str
    fn: Callable[..., Any]
    reason: str = ""
    dtype: torch.dtype = torch.float32
    candidates: int = 1
    coordinate_descent: bool = False
    grad: bool = False
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)

    def inputs(self) -> tuple[Tensor, ...]:
        code = self.fn.__code__
        names = code.co_varnames[: code.co_argcount]
        dtypes = {"n": torch.int64, "c": torch.complex64} | self.dtypes
        made = [torch.randn(_SHAPES[n]).mul(2).to(dtypes.get(n, self.dtype)) for n in names]
        return tuple(t.requires_grad_(self.grad and t.is_floating_point()) for t in made)


BF16 = torch.bfloat16

NEGATIVES = [
    Negative("elementwise-gate", elementwise_gate, "64 outputs, not 1", BF16),
    Negative("elementwise-gate-train", elementwise_gate, "64 outputs, not 1", grad=True),
    Negative("value-one-wide", elementwise_gate_on_width_one, "one element wide"),
    Negative("affine-logit", affine_logit, "comes from aten.mul", BF16),
    Negative("affine-logit-cdt", affine_logit, "from aten.mul", BF16, coordinate_descent=True),
    Negative("scaled-logit", scaled_logit, "affine"),
    Negative("scaled-logit-cdt", scaled_logit, "affine", coordinate_descent=True),
    Negative("shifted-logit", shifted_logit, "affine"),
    Negative("negated-logit", negated_logit, "affine"),
    Negative("clamped-logit", clamped_logit, "comes from aten.clamp"),
    Negative("nonlinear-logit", nonlinear_logit, "comes from aten.tanh", BF16),
    Negative("max-logit", max_logit, "comes from aten.amax"),
    Negative("mean-logit", mean_logit, "comes from an input"),
    Negative("bilinear-logit", bilinear_logit, "neither factor is one row of weights"),
    Negative("sum-over-rows", sum_over_rows, "a dimension that is not the last"),
    Negative("logit-is-input", logit_is_input, "an input of the graph", BF16),
    Negative("gate-plus-epsilon", gate_plus_epsilon, "goes into aten.add"),
    Negative("gate-scaled", gate_scaled, "by a constant or by itself"),
    Negative("gate-squared", gate_squared, "by a constant or by itself"),
    Negative("gate-divides", gate_divides, "goes into aten.div"),
    Negative("lerp", lerp, "goes into aten"),
    Negative("lerp-written-out", lerp_written_out, "a lerp"),
    Negative("lerp-written-out-bf16", lerp_written_out, "a lerp", BF16),
    Negative("one-gate-for-several-heads", one_gate_for_several_heads, "several rows"),
    Negative("wider-than-value", wider_than_value, "goes into aten.expand"),
    Negative("value-broadcast-over-rows", value_broadcast_over_rows, "wider than the value"),
    Negative("gate-broadcast-over-rows", gate_broadcast_over_rows),
    Negative("transposed-rows", transposed_rows, "several rows"),
    Negative("per-head-gate", per_head_gate, "4 outputs, not 1", BF16),
    Negative("router", router, "4 outputs, not 1"),
    Negative("gate-only", gate_only, "which returns it", BF16),
    Negative("softplus-gate", softplus_gate, "not a sigmoid, but"),
    Negative("tanh-gate", tanh_gate, "not a sigmoid, but aten.tanh"),
    Negative("silu-mlp", silu_mlp, candidates=0),
    Negative("delta-net-beta", delta_net_beta, "4 outputs, not 1"),
    Negative("batched-weights", batched_weights, "one weight per batch"),
    Negative("bias-per-row", bias_per_row, "differs from row to row"),
    Negative("two-linears", two_linears, "differs from row to row"),
    Negative("scaled-addmm", scaled_addmm, "alpha or beta"),
    Negative("second-of-two-columns", second_of_two_columns, "a slice"),
    Negative("padded-in-front", padded_in_front, "a slice"),
    Negative("every-second-row", every_second_row, "a slice"),
    Negative("fp64", linear, "is float64", torch.float64),
    Negative("fp64-value", linear, "the value is float64", dtypes={"v": torch.float64}),
    Negative("integer-value", integer_value, "the value is int64"),
    Negative("integer-logit", integer_logit, "comes from an input"),
    Negative("complex-value", complex_value, "the value is complex64"),
    Negative("value-from-logit", value_from_logit, "the value depends on the logit"),
    Negative("dropout-gate", dropout_gate),
]


@pytest.mark.parametrize("negative", NEGATIVES, ids=lambda negative: negative.id)
def test_left_alone(negative: Negative) -> None:
    torch.manual_seed(0)
    result = compile_and_compare(
        negative.fn,
        negative.inputs(),
        grad=negative.grad,
        coordinate_descent=negative.coordinate_descent,
        alone=True,
    )
    result.check_identical()
    forward = [g for g in result.report.graphs if g.phase != "backward"]
    assert result.report.fused == 0
    assert [len(g.sites) for g in forward] == [0]
    assert [len(g.rejections) for g in forward] == [negative.candidates]
    for rejection in result.report.rejections:
        assert rejection.reason
        assert negative.reason in rejection.reason
        assert rejection.node
    for graph in forward:
        assert graph.after is None or op_nodes(graph.after) == 0


def values_from_each_others_logits(
    x: Tensor, w: Tensor, v: Tensor, r: Tensor
) -> tuple[Tensor, ...]:
    a, b = F.linear(x, w), F.linear(r, w)
    return torch.sigmoid(a) * (v + b), torch.sigmoid(b) * (v + a)


def values_from_logits_in_a_ring(x: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    a, b, c = (F.linear(t, w) for t in (x, v, x + v))
    gates = [torch.sigmoid(z) for z in (c, a, b)]
    return tuple(g * (v + z) for g, z in zip(gates, (b, c, a), strict=True))


@pytest.mark.parametrize(
    ("fn", "sites"), [(values_from_each_others_logits, 2), (values_from_logits_in_a_ring, 3)]
)
def test_values_that_depend_on_other_gates(fn: Callable[..., Any], sites: int) -> None:
    """Each gate alone could be fused; together the ops would wait for each other."""
    result = compile_and_compare(fn, Negative("", fn).inputs())
    result.check()
    assert result.report.fused == sites - 1
    (rejection,) = result.report.rejections
    assert "depends on the logit" in rejection.reason


def draws_from_the_gate(x: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    gate = torch.sigmoid(F.linear(x, w))
    counts = torch.poisson(gate.expand(5, H))
    return gate * (v + torch.rand_like(v)), counts


def test_random_numbers_keep_their_order() -> None:
    """With eager's generator, what is drawn first gets the first numbers: fused or left alone."""
    with torch._inductor.config.patch(fallback_random=True):
        result = compile_and_compare(draws_from_the_gate, Negative("", linear).inputs(), alone=True)
    torch.testing.assert_close(result.fused, result.inductor)
    assert len(result.report.rejections) == 1 - result.report.fused
