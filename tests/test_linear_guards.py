"""Each guard of the matcher above the sigmoid, met alone: the forms of the linear."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.guards import BF16, Guard, gate

aten = torch.ops.aten


def before_the_bias(x: Tensor, w: Tensor, v: Tensor, b: Tensor) -> Any:
    z = F.linear(x, w)
    return torch.sigmoid(z + b) * v, z


GUARDS = [
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
    Guard("cut-after-the-first", lambda x, w, v: torch.sigmoid(
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
    Guard("width-not-last-and-rounded", lambda x, w, v: torch.sigmoid(
          (x.unsqueeze(-1).to(BF16) * w).sum(1)) * v, 0, ("not in its last dimension",),
          sizes={"w": (16, 1)}, dtypes={"w": BF16}),
    Guard("width-not-last-and-widened", lambda x, w, v: torch.sigmoid(
          (x.unsqueeze(-1).float() * w).sum(1)) * v, 1, sizes={"w": (16, 1)}, dtypes={"x": BF16}),
    Guard("sum-of-the-columns", lambda x, w, v: torch.sigmoid(
          (x.t() * w).sum(-1, True)) * v, 1, sizes={"x": (16, 16), "v": (16, 16)}),
    Guard("sums-of-the-columns", lambda x, w, v: torch.sigmoid(
          (x.transpose(1, 2) * w).sum(-1, True)) * v, 1,
          sizes={"x": (2, 16, 16), "v": (2, 16, 16)}),
    Guard("logit-expanded-to-itself", lambda x, w, v: torch.sigmoid(
          F.linear(x, w).expand(6, 1)) * v, 1),
    Guard("sum-of-one-number", lambda x, w, v: torch.sigmoid(
          (x.view(1, 1) * w).sum(-1, True)) * v, 1, sizes={"x": (), "w": (1, 1), "v": (1, 16)}),
    Guard("before-the-bias", before_the_bias, 0, ("before the bias is used elsewhere",)),
]  # fmt: skip


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: guard.id)
def test_guard(guard: Guard) -> None:
    guard.check()
