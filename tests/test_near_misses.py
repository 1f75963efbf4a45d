"""Functions in the place of the sigmoid: which are named, and which are no gate at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.guards import Guard


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


def scaled_and_by_tanh(x: Tensor, w: Tensor, v: Tensor, r: Tensor) -> Any:
    z = F.linear(x, w)
    return z * v, torch.tanh(z) * r


def one_of(functions: int) -> Callable[..., Any]:
    """The search for the product stops after 48 nodes."""

    def fn(x: Tensor, w: Tensor, v: Tensor) -> Any:
        z = F.linear(x, w)
        return [z + i for i in range(functions - 1)], torch.tanh(z) * v

    return fn


GUARDS = [
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
    Guard("one-of-forty-eight-functions", one_of(48), 0, ("aten.tanh",)),
    Guard("one-of-forty-nine-functions", one_of(49)),
    Guard(
        "tanh-of-a-total",
        lambda x, w, v: torch.tanh(F.linear(x, w).sum()) * v,
    ),
    Guard("tanh-of-wider", lambda x, w, v: torch.tanh(F.linear(x, w) + v).amax(-1, True) * v),
]  # fmt: skip


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: guard.id)
def test_guard(guard: Guard) -> None:
    guard.check()
