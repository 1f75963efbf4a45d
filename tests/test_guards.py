"""Each guard of the matcher below the sigmoid, met alone: products, addends, kept logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.guards import BF16, Guard, gate


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


def two_products(x: Tensor, w: Tensor, v: Tensor, r: Tensor) -> Any:
    g = gate(x, w)
    return g * v, g * r


def lerp_with_views(x: Tensor, w: Tensor, v: Tensor, r: Tensor) -> Tensor:
    g = gate(x, w)
    return g * v + (1 - g).view(6, 1) * r


def function_of_the_complement(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    g = gate(x, w)
    return g * v + torch.tanh(1 - g)


def complement_beside_the_product(x: Tensor, w: Tensor, v: Tensor, r: Tensor) -> Any:
    g = gate(x, w)
    return g * v, (1 - g) * r


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
    Guard("one-row-expanded", lambda x, w, v: gate(x.view(1, 16), w).view(1).expand(16) * v, 1,
          sizes={"x": (16,), "v": (16,)}),
    Guard("gates-repeated", lambda x, w, v: gate(x, w).view(2, 3).repeat(1, 2) * v, 0,
          ("goes into aten.repeat",), sizes={"v": (2, 6)}),
    Guard("batches-of-gates-transposed", lambda x, w, v: gate(x, w).transpose(0, 1) * v, 0,
          ("goes into aten.transpose",), sizes={"x": (2, 3, 16), "v": (3, 2, 16)}),
    Guard("gates-transposed", lambda x, w, v: gate(x, w).view(2, 3).t().reshape(6, 1) * v, 0,
          ("goes into aten.t",)),
    Guard("gates-in-rows", lambda x, w, v: gate(x, w).transpose(1, 2).reshape(2, 3, 1) * v, 1,
          sizes={"x": (2, 3, 16), "v": (2, 3, 16)}),
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
    Guard("second-product", two_products, 1, dtypes={"v": torch.float64}),
    Guard("value-of-one-row", lambda x, w, v: gate(x, w) * v, 0, ("wider than the value",),
          sizes={"v": (6,)}),
    Guard("addcmul-and-another-addend", lambda x, w, v, r, b: torch.addcmul(r, gate(x, w), v) + b,
          1, addends=1, sizes={"b": (6, 16)}),
    Guard("lerp-with-views", lerp_with_views, 0, ("a lerp",)),
    Guard("function-of-the-complement", function_of_the_complement, 1),
    Guard("complement-beside-the-product", complement_beside_the_product, 1),
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
    Guard("more-dimensions", lambda x, w, v: more_dimensions_kept(x, w, v)[0], 1,
          sizes={"x": (2, 3, 16), "w": (16, 1, 1), "v": (2, 3, 16)}, tracing="symbolic"),
    Guard("one-dimension-more-kept", one_dimension_more_kept, 1, sizes={"w": (16, 1, 1)},
          tracing="symbolic"),
]  # fmt: skip


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: guard.id)
def test_guard(guard: Guard) -> None:
    guard.check()
