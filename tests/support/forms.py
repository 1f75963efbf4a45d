"""Forms: every way of writing the gate that must become one op.

A form is a function whose parameter names say what it takes; `make_inputs` builds those.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

H = 64
Sizes = dict[str, tuple[int, ...]]


def _shapes(lead: tuple[int, ...], d: int, h: int) -> Sizes:
    rows = math.prod(lead)
    return {
        "x": (*lead, h),
        "v": (*lead, d),
        "r": (*lead, d),
        "r2": (*lead, d),
        "rows_x": (rows, h),
        "rows_v": (rows, d),
        "rows_r": (rows, d),
        "w": (1, h),
        "w_col": (h, 1),
        "w_vec": (h,),
        "wv": (d, h),
        "b": (1,),
        "b_scalar": (),
        "b_square": (1, 1),
        "norm": (h,),
        "x_wide": (*lead, 2 * h),
        "v_wide": (*lead, 2 * d),
        "w_table": (3, h),
    }


def make_inputs(
    fn: Callable[..., Any],
    *,
    lead: tuple[int, ...] = (5,),
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    d: int = H,
    h: int = H,
    grad: bool = False,
    seed: int = 0,
    dtypes: dict[str, torch.dtype] | None = None,
) -> tuple[Tensor, ...]:
    """Random inputs for the parameters of `fn`, weights scaled so that logits are of order 1."""
    generator = torch.Generator().manual_seed(seed)
    shapes = _shapes(lead, d, h)
    result = []
    for name in inspect.signature(fn).parameters:
        t = torch.randn(shapes[name], generator=generator)
        if name.startswith("w"):
            t = t / math.sqrt(h)
        t = t.to(device, (dtypes or {}).get(name, dtype))
        result.append(t.requires_grad_(grad))
    return tuple(result)


# --- the linear, written in its ways ----------------------------------------------------------


def linear(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(F.linear(x, w)) * v


def value_first(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return v * torch.sigmoid(F.linear(x, w))


def linear_bias(x: Tensor, w: Tensor, v: Tensor, b: Tensor) -> Tensor:
    return torch.sigmoid(F.linear(x, w, b)) * v


def bias_after(x: Tensor, w: Tensor, v: Tensor, b: Tensor) -> Tensor:
    return torch.sigmoid(F.linear(x, w) + b) * v


def bias_before(x: Tensor, w: Tensor, v: Tensor, b: Tensor) -> Tensor:
    return torch.sigmoid(b + x @ w.t()) * v


def bias_scalar(x: Tensor, w: Tensor, v: Tensor, b_scalar: Tensor) -> Tensor:
    return torch.sigmoid(F.linear(x, w) + b_scalar) * v


def bias_square(x: Tensor, w: Tensor, v: Tensor, b_square: Tensor) -> Tensor:
    return torch.sigmoid(torch.addmm(b_square, x, w.t())) * v


def weight_row_of_table(x: Tensor, w_table: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(F.linear(x, w_table[1:2])) * v


def weight_reordered(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """A weight in another order than its parameter, of the same shape: the order counts."""
    return torch.sigmoid(F.linear(x, w.view(8, -1).t().reshape(w.shape))) * v


def weight_reordered_sum(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid((x * w.view(8, -1).t().reshape(-1)).sum(-1, keepdim=True)) * v


def addmm(x: Tensor, w_col: Tensor, v: Tensor, b: Tensor) -> Tensor:
    return torch.sigmoid(torch.addmm(b, x, w_col)) * v


def matmul_t(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(x @ w.t()) * v


def matmul_col(x: Tensor, w_col: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(x @ w_col) * v


def matvec(x: Tensor, w_vec: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(x @ w_vec).unsqueeze(-1) * v


def matvec_late(x: Tensor, w_vec: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(torch.matmul(x, w_vec)[..., None]) * v


def bmm(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(torch.bmm(x, w.t().unsqueeze(0))) * v


def einsum(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(torch.einsum("...h,oh->...o", x, w)) * v


def einsum_vec(x: Tensor, w_vec: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(torch.einsum("...h,h->...", x, w_vec)).unsqueeze(-1) * v


def product_sum(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid((x * w).sum(-1, keepdim=True)) * v


def product_sum_vec(x: Tensor, w_vec: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid((w_vec * x).sum(-1)).unsqueeze(-1) * v


def padded(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """As Inductor pads products on CUDA: zeros behind rows, width and columns, cut off again."""
    product = F.pad(x, [0, 2, 0, 3]) @ F.pad(w.t(), [0, 7, 0, 2])
    return torch.sigmoid(product[:-3][:, :-7]) * v


def padded_columns(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid((x @ F.pad(w.t(), [0, 7]))[:, :-7]) * v


def padded_addmm(x: Tensor, w: Tensor, v: Tensor, b: Tensor) -> Tensor:
    return torch.sigmoid(torch.addmm(b, x, F.pad(w.t(), [0, 7]))[:, :-7]) * v


def padded_with_ones(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """A bias by padding: the padding is part of the linear."""
    product = F.pad(x, [0, 2], value=1.0) @ F.pad(w.t(), [0, 0, 0, 2], value=0.5)
    return torch.sigmoid(product) * v


def functional_sigmoid(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return F.sigmoid(F.linear(x, w)) * v


def method_sigmoid(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return F.linear(x, w).sigmoid().mul(v)


# --- conversions ------------------------------------------------------------------------------


def float_cast_back(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(F.linear(x, w).float()).to(v.dtype) * v


def float_no_cast_back(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(F.linear(x, w).float()) * v


def float_cast_product(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return (torch.sigmoid(F.linear(x, w).float()) * v.float()).to(v.dtype)


def float_linear(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(F.linear(x.float(), w.float())).to(v.dtype) * v


def autocast_linear(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    with torch.autocast(x.device.type, torch.bfloat16):
        return torch.sigmoid(F.linear(x, w)) * v


def autocast_block(x: Tensor, w: Tensor, wv: Tensor, r: Tensor) -> Tensor:
    with torch.autocast(x.device.type, torch.bfloat16):
        return r + torch.sigmoid(F.linear(x, w)) * F.linear(x, wv)


# --- the addend -------------------------------------------------------------------------------


def addend_first(x: Tensor, w: Tensor, v: Tensor, r: Tensor) -> Tensor:
    return r + torch.sigmoid(F.linear(x, w)) * v


def addend_last(x: Tensor, w: Tensor, v: Tensor, r: Tensor) -> Tensor:
    return v * torch.sigmoid(F.linear(x, w)) + r


def addend_bias(x: Tensor, w: Tensor, v: Tensor, b: Tensor, r: Tensor) -> Tensor:
    return r + torch.sigmoid(F.linear(x, w, b)) * v


def addend_reshaped(x: Tensor, w: Tensor, v: Tensor, r: Tensor) -> Tensor:
    rows = torch.sigmoid(F.linear(x.reshape(-1, x.shape[-1]), w)) * v.reshape(-1, v.shape[-1])
    return r + rows.reshape(v.shape)


def addend_product_used_twice(x: Tensor, w: Tensor, v: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    y = torch.sigmoid(F.linear(x, w)) * v
    return r + y, y


def addend_depends_on_result(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    y = torch.sigmoid(F.linear(x, w)) * v
    return y + y.relu()


def addend_is_value(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return v + torch.sigmoid(F.linear(x, w)) * v


def sum_of_two_gates(x: Tensor, w: Tensor, v: Tensor, r: Tensor) -> Tensor:
    return torch.sigmoid(F.linear(x, w)) * v + torch.sigmoid(F.linear(r, w)) * r


def addend_scaled(x: Tensor, w: Tensor, v: Tensor, r: Tensor) -> Tensor:
    return torch.add(r, torch.sigmoid(F.linear(x, w)) * v, alpha=2)


def addend_broadcast(x: Tensor, w: Tensor, v: Tensor, norm: Tensor) -> Tensor:
    return norm + torch.sigmoid(F.linear(x, w)) * v


def shared_expert(x: Tensor, w: Tensor, wv: Tensor, norm: Tensor, r: Tensor) -> Tensor:
    """The gate with its neighbours: a norm in front, the value a matmul, the routed add behind."""
    h = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * norm
    return r + torch.sigmoid(F.linear(h, w)) * F.silu(F.linear(h, wv))


def shared_expert_rows(x: Tensor, w: Tensor, wv: Tensor, r: Tensor) -> Tensor:
    """As in transformers' models: the block works on rows, its output is reshaped back."""
    rows = x.view(-1, x.shape[-1])
    y = torch.sigmoid(F.linear(rows, w)) * F.silu(F.linear(rows, wv))
    return r + y.reshape(x.shape)


# --- neighbours and shapes --------------------------------------------------------------------


def value_node(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(F.linear(x, w)) * torch.tanh(v)


def value_matmul(x: Tensor, w: Tensor, wv: Tensor) -> Tensor:
    return torch.sigmoid(F.linear(x, w)) * F.linear(x, wv)


def value_is_input(x: Tensor, w: Tensor) -> Tensor:
    return torch.sigmoid(F.linear(x, w)) * x


def strided_rows(x_wide: Tensor, w: Tensor, v_wide: Tensor) -> Tensor:
    x, v = x_wide[..., : w.shape[-1]], v_wide.chunk(2, dim=-1)[1]
    return torch.sigmoid(F.linear(x, w)) * v


def strided_rows_odd(x_wide: Tensor, w: Tensor, v_wide: Tensor) -> Tensor:
    """Rows that start at odd elements."""
    x, v = x_wide[..., 1 : w.shape[-1] + 1], v_wide[..., 3 : v_wide.shape[-1] // 2 + 3]
    return torch.sigmoid(F.linear(x, w)) * v


def value_transposed(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """A value whose rows are its columns: the output keeps its strides, as in eager."""
    v = torch.tanh(v.transpose(0, -1).contiguous()).transpose(0, -1)
    return torch.sigmoid(F.linear(x, w)) * v


def input_transposed(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    x = torch.tanh(x.transpose(0, -1).contiguous()).transpose(0, -1)
    return torch.sigmoid(F.linear(x, w)) * v


def addend_transposed(x: Tensor, w: Tensor, v: Tensor, r: Tensor) -> Tensor:
    r = torch.tanh(r.transpose(0, -1).contiguous()).transpose(0, -1)
    return r + torch.sigmoid(F.linear(x, w)) * v


def shape_chain(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    n = x.shape[0]
    z = F.linear(x, w).view(n, 1, 1).squeeze(-1).unsqueeze(0).permute(1, 0, 2).clone()
    gate = torch.sigmoid(z).reshape(n).unsqueeze(-1).unsqueeze(0).squeeze(0)
    return gate.expand(n, 1).contiguous() * v


def shape_chain_expanded(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    gate = torch.sigmoid(F.linear(x, w)).transpose(0, 1).reshape(x.shape[0], 1)
    return gate.expand(v.shape) * v


def rows_then_3d(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    gate = torch.sigmoid(F.linear(x.reshape(-1, x.shape[-1]), w))
    return gate.view(*v.shape[:-1], 1) * v


def rows_then_3d_of_input(x: Tensor, w: Tensor) -> Tensor:
    gate = torch.sigmoid(F.linear(x.reshape(-1, x.shape[-1]), w))
    return gate.view(*x.shape[:-1], 1) * torch.tanh(x)


def permuted_input(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """Gates from rows in another order than the value's: one row of input per row of value."""
    gate = torch.sigmoid(F.linear(x.transpose(0, 1), w))
    return gate.reshape(*v.shape[:-1], 1) * v


def shared_gate(x: Tensor, w: Tensor, v: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    gate = torch.sigmoid(F.linear(x, w))
    return gate * v, gate * r


def gate_returned(x: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    gate = torch.sigmoid(F.linear(x, w))
    return gate * v, gate


def logit_returned(x: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    logit = F.linear(x, w)
    return torch.sigmoid(logit) * v, logit


def two_layers(x: Tensor, w: Tensor, v: Tensor, r: Tensor) -> Tensor:
    y = r + torch.sigmoid(F.linear(x, w)) * v
    return r + torch.sigmoid(F.linear(y, w)) * torch.tanh(y)


def checkpointed(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return checkpoint(linear, x, w, v, use_reentrant=False)


# --- modules ------------------------------------------------------------------------------------


class Gate(nn.Module):
    """A gate with its weights as parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(H, 1)

    def forward(self, x: Tensor, v: Tensor) -> Tensor:
        return torch.sigmoid(self.gate(x)) * v
