"""Each guard of the matcher, met alone: small graphs as ``make_fx`` traces them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

import gatefuse
from gatefuse.inductor.fusion_pass import GateFusionPass

aten = torch.ops.aten
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


def gate(x: Tensor, w: Tensor) -> Tensor:
    return torch.sigmoid(F.linear(x, w))


def before_the_bias(x: Tensor, w: Tensor, v: Tensor, b: Tensor) -> Any:
    z = F.linear(x, w)
    return torch.sigmoid(z + b) * v, z


def one_logit_two_sigmoids(x: Tensor, w: Tensor, v: Tensor, r: Tensor) -> Any:
    z = F.linear(x, w)
    return torch.sigmoid(z) * v, torch.sigmoid(z) * r


def addend_of_addcmul_from_the_logit(x: Tensor, w: Tensor, v: Tensor, r: Tensor) -> Any:
    z = F.linear(x, w)
    return torch.addcmul(r + z, torch.sigmoid(z), v), z


def other_complement(x: Tensor, w: Tensor, v: Tensor, r: Tensor) -> Tensor:
    return gate(x, w) * v + (1 - torch.sigmoid(r)) * r


def function_of_the_gate(x: Tensor, w: Tensor, v: Tensor, r: Tensor) -> Tensor:
    g = gate(x, w)
    return g * v + torch.tanh(g) * r


def doubled(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    y = gate(x, w) * v
    return y + y


def repeatedly(f: Callable[[Tensor], Tensor], times: int) -> Callable[..., Tensor]:
    def fn(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        z = F.linear(x, w)
        for _ in range(times):
            z = f(z)
        return z * v

    return fn


def fused_and_scaled(x: Tensor, w: Tensor, v: Tensor, r: Tensor) -> Any:
    z = F.linear(x, w)
    return torch.sigmoid(z) * v, torch.tanh(z) * r


def two_products(x: Tensor, w: Tensor, v: Tensor, r: Tensor) -> Any:
    g = gate(x, w)
    return g * v, g * r


def lerp_with_views(x: Tensor, w: Tensor, v: Tensor, r: Tensor) -> Tensor:
    g = gate(x, w)
    return g * v + (1 - g).view(6, 1) * r


def function_of_the_complement(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    g = gate(x, w)
    return g * v + torch.tanh(1 - g)


def value_is_the_complement(x: Tensor, w: Tensor, r: Tensor) -> Tensor:
    g = gate(x, w).expand(6, 16)
    return g * (1 - g) + r


def sum_kept(x: Tensor, w: Tensor, v: Tensor) -> Any:
    z = (x * w).sum(-1)
    return torch.sigmoid(z).unsqueeze(-1) * v, z


def rows_kept(x: Tensor, w: Tensor, v: Tensor) -> Any:
    z = F.linear(x.view(-1, x.shape[-1]), w)
    return torch.sigmoid(z).view(*v.shape[:-1], 1) * v, z


def batches_kept(x: Tensor, w: Tensor, v: Tensor) -> Any:
    z = (x.view(-1, x.shape[2], 16) * w).sum(-1)
    return torch.sigmoid(z).view(*v.shape[:-1], 1) * v, z


def more_dimensions_kept(x: Tensor, w: Tensor, v: Tensor) -> Any:
    z = (x[..., None, None] * w).sum(2)
    return torch.sigmoid(z).squeeze(-1) * v, z


def one_dimension_more_kept(x: Tensor, w: Tensor, v: Tensor) -> Any:
    z = (x[..., None, None] * w).sum(1)
    return torch.sigmoid(z).squeeze(-1) * v, z


def scaled_and_by_tanh(x: Tensor, w: Tensor, v: Tensor, r: Tensor) -> Any:
    z = F.linear(x, w)
    return z * v, torch.tanh(z) * r


GUARDS = [
    # What the gate goes into.
    Guard("gate-is-addend", lambda x, w, v, r: torch.addcmul(gate(x, w), v, r), 0, ("addcmul",)),
    Guard(
        "addcmul-addend-bf16",
        lambda x, w, v, r: torch.addcmul(r, gate(x, w), v),
        0,
        ("of another dtype",),
        dtypes={"r": BF16},
    ),
    Guard(
        "one-gate-expanded-to-rows",
        lambda x, w, v: gate(x, w).expand(6, 16) * v,
        0,
        ("goes into aten.expand",),
        sizes={"x": (1, 16)},
    ),
    Guard(
        "scalar-expanded",
        lambda x, w, v: gate(x, w).squeeze().expand(16) * v,
        0,
        ("goes into aten.expand",),
        sizes={"x": (1, 16), "v": (16,)},
    ),
    Guard(
        "scalars",
        lambda x, w, v: gate(x, w).squeeze() * v,
        0,
        ("fewer dimensions",),
        sizes={"x": (1, 16), "v": ()},
    ),
    Guard(
        "gates-scale-columns",
        lambda x, w, v: gate(x, w).squeeze(-1) * v,
        0,
        ("fewer dimensions",),
        sizes={"v": (6, 6)},
    ),
    Guard(
        "gates-in-a-row",
        lambda x, w, v: gate(x, w).t() * v,
        0,
        ("differ in their number of rows",),
        sizes={"v": (1, 6)},
    ),
    Guard(
        "gate-of-a-gate",
        lambda x, w, r: gate(x, w).expand(6, 16) * gate(r, w).expand(6, 16),
        1,
        ("part of another site",),
    ),
    Guard("one-logit-two-sigmoids", one_logit_two_sigmoids, 1, ("part of another site",)),
    # The addend.
    Guard("addend-is-a-number", lambda x, w, v: gate(x, w) * v + 1.0, 1),
    Guard("addend-is-the-product", doubled, 1),
    Guard(
        "addend-bf16", lambda x, w, v, r: r + gate(x, w) * v, 1, dtypes={"r": BF16}
    ),
    Guard(
        "addend-of-more-dimensions",
        lambda x, w, v, r: r + gate(x, w) * v,
        1,
        sizes={"r": (3, 6, 16)},
    ),
    Guard(
        "addend-of-another-width",
        lambda x, w, v, r: r + (gate(x, w) * v).view(12, 8),
        1,
        sizes={"r": (12, 8)},
    ),
    Guard(
        "addend-after-a-function", lambda x, w, v, r: r + torch.tanh(gate(x, w) * v), 1
    ),
    Guard(
        "addend-from-the-logit",
        addend_of_addcmul_from_the_logit,
        0,
        ("the addend depends on the logit",),
    ),
    Guard("another-complement", other_complement, 1, ("logit is an input",), addends=1),
    Guard("function-of-the-gate", function_of_the_gate, 1),
    # The linear.
    Guard(
        "cropped",
        lambda x, w, v: torch.sigmoid((F.pad(x, [0, -2]) @ F.pad(w.t(), [0, 7, 0, -2]))[:, :1]) * v,
        0,
        ("a slice",),
    ),
    Guard(
        "padded-in-front",
        lambda x, w, v: torch.sigmoid((F.pad(x, [2, 0]) @ F.pad(w.t(), [0, 7, 0, 2]))[:, :1]) * v,
        0,
        ("a slice",),
    ),
    Guard(
        "sum-over-two-dimensions",
        lambda x, w, v: torch.sigmoid((x * w).sum([0, 1], keepdim=True)) * v,
        0,
        ("more than one dimension",),
        sizes={"x": (1, 16), "v": (1, 16)},
    ),
    Guard(
        "sum-of-a-multiple",
        lambda x, w, v: torch.sigmoid((x * 2.0).sum(-1, keepdim=True)) * v,
        0,
        ("products with a constant",),
    ),
    Guard(
        "width-not-last",
        lambda x, w, v: torch.sigmoid((x * w).sum(1)) * v,
        0,
        ("not in its last dimension",),
        sizes={"x": (6, 16, 1), "w": (16, 1)},
    ),
    Guard(
        "slice-of-a-matrix-vector-product",
        lambda x, w, v: torch.sigmoid(torch.mv(x, w)[:3]).unsqueeze(-1) * v,
        0,
        ("a slice",),
        sizes={"w": (16,), "v": (3, 16)},
    ),
    Guard(
        "addmm-scaled-bias",
        lambda x, w, v, b: torch.sigmoid(torch.addmm(b, x, w.t(), beta=2)) * v,
        0,
        ("alpha or beta",),
    ),
    Guard(
        "addmm-scaled-product",
        lambda x, w, v, b: torch.sigmoid(torch.addmm(b, x, w.t(), alpha=2)) * v,
        0,
        ("alpha or beta",),
    ),
    Guard(
        "addmm-bias-per-row",
        lambda x, w, v, b: torch.sigmoid(torch.addmm(b, x, w.t())) * v,
        0,
        ("from row to row",),
        sizes={"b": (6, 1)},
    ),
    Guard(
        "two-biases",
        lambda x, w, v, b: torch.sigmoid(torch.addmm(b, x, w.t()) + b) * v,
        0,
        ("two biases",),
    ),
    Guard(
        "bias-scaled",
        lambda x, w, v, b: torch.sigmoid(torch.add(F.linear(x, w), b, alpha=2)) * v,
        0,
        ("the bias is scaled",),
    ),
    Guard(
        "bias-is-a-number",
        lambda x, w, v: torch.sigmoid(F.linear(x, w) + 1.0) * v,
        0,
        ("a constant is added",),
    ),
    Guard(
        "bias-of-more-dimensions",
        lambda x, w, v, b: torch.sigmoid(F.linear(x, w) + b).squeeze(0) * v,
        0,
        ("other than one bias",),
        sizes={"b": (1, 1, 1)},
    ),
    Guard("second-product", two_products, 1, dtypes={"v": torch.float64}),
    Guard("value-of-one-row", lambda x, w, v: gate(x, w) * v, 0, ("wider than the value",),
          sizes={"v": (6,)}),
    Guard("addcmul-and-another-addend", lambda x, w, v, r, b: torch.addcmul(r, gate(x, w), v) + b,
          1, addends=1, sizes={"b": (6, 16)}),
    Guard("lerp-with-views", lerp_with_views, 0, ("a lerp",)),
    Guard("function-of-the-complement", function_of_the_complement, 1),
    Guard("value-is-the-complement", value_is_the_complement, 0, ("value depends on the logit",)),
    Guard("expanded-to-itself", lambda x, w, v: gate(x, w).expand(6, 1) * v, 1),
    # Logits that are used elsewhere, of sizes known only when the code runs.
    Guard("sum-kept", sum_kept, 1, sizes={"x": (2, 3, 16), "v": (2, 3, 16)}, tracing="symbolic"),
    Guard("rows-kept", rows_kept, 1, sizes={"x": (2, 3, 16), "v": (2, 3, 16)},
          tracing="symbolic"),
    Guard("batches-kept", batches_kept, 1, sizes={"x": (2, 3, 4, 16), "v": (2, 3, 4, 16)},
          tracing="symbolic"),
    Guard("more-dimensions-kept", more_dimensions_kept, 0, ("not one per row",),
          sizes={"x": (2, 3, 16), "w": (16, 1, 1), "v": (2, 3, 16)}, tracing="symbolic"),
    # The linear, again.
    Guard("cut-behind-the-first", lambda x, w, v: torch.sigmoid(
          (x @ F.pad(w.t(), [0, 7]))[:, 1:2]) * v, 0, ("a slice",)),
    Guard("every-second-padded-row", lambda x, w, v: torch.sigmoid(
          (F.pad(x, [0, 0, 0, 6]) @ w.t())[::2]) * v, 0, ("a slice",)),
    Guard("widths-differ-without-padding", lambda x, w, v: torch.sigmoid(
          (F.pad(x, [0, 8]) @ F.pad(w.t(), [0, 7]))[:, :1]) * v, 0, ("a slice",),
          sizes={"w": (1, 24)}),
    Guard("sum-of-a-rounded-product", lambda x, w, v: torch.sigmoid(
          (x * w).to(BF16).float().sum(-1, keepdim=True)) * v, 0, ("comes from aten._to_copy",)),
    Guard("sum-of-a-widened-product", lambda x, w, v: torch.sigmoid(
          (x * w).float().sum(-1, keepdim=True)) * v, 1, dtypes={"x": BF16, "w": BF16}),
    Guard("sum-over-all", lambda x, w, v: torch.sigmoid(
          aten.sum.dim_IntList(x * w, None, True)) * v, 0, ("more than one dimension",),
          sizes={"x": (1, 16), "v": (1, 16)}),
    Guard("sum-of-weights-times-a-number-per-row", lambda x, w, v: torch.sigmoid(
          (x * w).sum(-1, keepdim=True)) * v, 0, ("neither factor",), sizes={"x": (6, 1)}),
    Guard("sum-of-a-row-times-a-weight", lambda x, w, v: torch.sigmoid(
          (x * w).sum(-1, keepdim=True)) * v, 0, ("neither factor",), sizes={"w": (1, 1)}),
    Guard("largest", lambda x, v: torch.sigmoid(torch.topk(x, 1)[0]) * v, 0, ("from getitem",)),
    Guard("sum-of-a-number-and-the-logit", lambda x, w, v, b: torch.sigmoid(
          F.linear(x, w) + b) * v, 0, ("other than one bias",), sizes={"b": (6, 1)}),
    Guard("bias-first", lambda x, w, v, b: torch.sigmoid(b + F.linear(x, w)) * v, 1,
          sizes={"x": (1, 16), "v": (1, 16), "b": (1, 1)}),
    Guard("matrix-vector", lambda x, w, v: torch.sigmoid(torch.mv(x, w)).unsqueeze(-1) * v, 1,
          sizes={"w": (16,)}),
    Guard("matrix-transposed-vector", lambda x, w, v: torch.sigmoid(
          torch.mv(x, w.t())).unsqueeze(-1) * v, 1, sizes={"w": (16,)}),
    Guard("batched", lambda x, w, v: torch.sigmoid(torch.bmm(x, w)) * v, 1,
          sizes={"x": (1, 6, 16), "w": (1, 16, 1), "v": (1, 6, 16)}),
    Guard("batched-and-padded", lambda x, w, v: torch.sigmoid(
          torch.bmm(x, F.pad(w, [0, 7]).expand(2, 16, 8))[..., :1]) * v, 1,
          sizes={"x": (2, 6, 16), "w": (1, 16, 1), "v": (2, 6, 16)}),
    Guard("square-input-transposed", lambda x, w, v: torch.sigmoid(F.linear(x.t(), w)) * v, 1,
          sizes={"x": (16, 16), "v": (16, 16)}),
    Guard("square-inputs-transposed", lambda x, w, v: torch.sigmoid(
          torch.bmm(x.transpose(1, 2), w.expand(2, 16, 1))) * v, 1,
          sizes={"x": (2, 16, 16), "w": (1, 16, 1), "v": (2, 16, 16)}),
    Guard("integer-input-converted", lambda x, w, v: torch.sigmoid(F.linear(x.float(), w)) * v, 1,
          dtypes={"x": torch.int64}),
    Guard("logit-in-float64", lambda x, w, v: torch.sigmoid(F.linear(x, w).double()).float() * v,
          0, ("from aten._to_copy",)),
    Guard("width-one", lambda x, w, v: torch.sigmoid(F.linear(x, w.view(1, 1))) * v, 1,
          sizes={"x": (6, 1), "w": ()}),
    Guard("width-one-vector", lambda x, w, v: torch.sigmoid(torch.mv(x, w)).unsqueeze(-1) * v, 1,
          sizes={"x": (6, 1), "w": (1,)}),
    Guard("one-number", lambda x, w, v: torch.sigmoid(F.linear(x.view(1, 1), w)) * v, 1,
          sizes={"x": (), "w": (1, 1), "v": (1, 16)}),
    Guard("one-row-alone", lambda x, w, v: gate(x.view(1, 16), w).view(1) * v, 1,
          sizes={"x": (16,), "v": (16,)}),
    Guard("one-dimension-more-kept", one_dimension_more_kept, 1, sizes={"w": (16, 1, 1)},
          tracing="symbolic"),
    Guard("sum-of-the-columns", lambda x, w, v: torch.sigmoid(
          (x.t() * w).sum(-1, True)) * v, 1, sizes={"x": (16, 16), "v": (16, 16)}),
    Guard("sums-of-the-columns", lambda x, w, v: torch.sigmoid(
          (x.transpose(1, 2) * w).sum(-1, True)) * v, 1,
          sizes={"x": (2, 16, 16), "v": (2, 16, 16)}),
    Guard("logit-expanded-to-itself", lambda x, w, v: torch.sigmoid(
          F.linear(x, w).expand(6, 1)) * v, 1),
    Guard("sum-of-one-number", lambda x, w, v: torch.sigmoid(
          (x.view(1, 1) * w).sum(-1, True)) * v, 1, sizes={"x": (), "w": (1, 1), "v": (1, 16)}),
    # What only resembles a gate.
    Guard("scaled-and-by-tanh", scaled_and_by_tanh, 0, ("aten.tanh",)),
    Guard("tanh-bounds", lambda x, w, v: torch.maximum(torch.tanh(F.linear(x, w)), v)),
    Guard("tanh-of-symbolic-width", lambda x, w, v: torch.tanh(F.linear(x, w)) * v,
          tracing="symbolic"),
    Guard("fused-and-scaled", fused_and_scaled, 1),
    Guard("rows-scaled-by-a-logit", lambda x, w, v: F.linear(x, w) * v),
    Guard("tanh-added", lambda x, w, v: torch.tanh(F.linear(x, w)) + v),
    Guard(
        "tanh-divides", lambda x, w, v: v / torch.tanh(F.linear(x, w)), 0, ("aten.tanh, stands",)
    ),
    Guard(
        "tanh-doubled",
        lambda x, w, v: torch.tanh(F.linear(x, w)) * 2.0 * v,
        0,
        ("aten.tanh, aten.mul.Tensor, stands",),
    ),
    Guard(
        "tanh-of-a-matrix-vector-product",
        lambda x, w, v: torch.tanh(torch.mv(x, w)).unsqueeze(-1) * v,
        0,
        ("aten.tanh",),
        sizes={"w": (16,)},
    ),
    Guard(
        "tanh-scales-columns",
        lambda x, w, v: torch.tanh(torch.mv(x, w)) * v,
        sizes={"w": (16,), "v": (6, 6)},
    ),
    Guard(
        "tanh-of-one-row",
        lambda x, w, v: torch.tanh(torch.mv(x, w)) * v,
        sizes={"x": (1, 16), "w": (16,), "v": (16,)},
    ),
    Guard(
        "tanh-of-two-outputs",
        lambda x, w, v: torch.tanh(F.linear(x, w))[:, :1] * v,
        sizes={"w": (2, 16)},
    ),
    Guard("two-wide", lambda x, w, v: torch.tanh(F.linear(x, w)) * v, sizes={"v": (6, 2)}),
    Guard("three-wide", lambda x, w, v: torch.tanh(F.linear(x, w)) * v, 0, ("aten.tanh",),
          sizes={"v": (6, 3)}),
    Guard("twelve-functions", repeatedly(torch.tanh, 12), 0, ("aten.tanh",)),
    Guard("thirteen-functions", repeatedly(torch.tanh, 13)),
    Guard(
        "tanh-of-a-total",
        lambda x, w, v: torch.tanh(F.linear(x, w).sum()) * v,
    ),
    Guard("tanh-of-wider", lambda x, w, v: torch.tanh(F.linear(x, w) + v).amax(-1, True) * v),
    Guard("before-the-bias", before_the_bias, 0, ("before the bias is used elsewhere",)),
]  # fmt: skip


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: guard.id)
def test_guard(guard: Guard) -> None:
    inputs = guard.inputs()
    module = make_fx(guard.fn, tracing_mode=guard.tracing)(*inputs)
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
    assert len(graph.rejections) == len(guard.reasons), graph.rejections
    for rejection, reason in zip(graph.rejections, guard.reasons):
        assert reason in rejection.reason
    assert graph.fused == guard.fused
    assert sum(site.has_addend for site in graph.sites) == guard.addends
