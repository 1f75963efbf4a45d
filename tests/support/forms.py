"""The table of forms: every way of writing the gate that must become one op, with its inputs.

A form is a function whose parameter names say what it takes; `make_inputs` builds those. Shared by
the CPU tests and the GPU tests.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
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


# --- the table --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """One row: a function, its inputs, and what gatefuse must make of it.

    fused, addend, bias, keeps_logit: number of op nodes in the forward graph, and of sites with
    each. backward: op nodes in the backward graph, at least. dynamic: which sizes are symbolic,
    those of rows or all. autocast: results may have been rounded to bfloat16 on their way.
    """

    id: str
    fn: Callable[..., Any]
    lead: tuple[int, ...] = (5,)
    dtype: torch.dtype = torch.float32
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    d: int = H
    fused: int = 1
    addend: int = 0
    bias: int = 0
    keeps_logit: int = 0
    backward: int = 0
    grad: bool = False
    dynamic: Literal["", "rows", "all"] = ""
    more_leads: tuple[tuple[int, ...], ...] = ()
    coordinate_descent: bool = False
    autocast: bool = False

    @property
    def gpu_placement(self) -> Literal["auto", "inline"]:
        """The placement with which the form is fused on a GPU."""
        return "inline" if self.dynamic == "all" else "auto"

    def inputs(
        self, device: str = "cpu", lead: tuple[int, ...] | None = None, **arguments: Any
    ) -> tuple[Tensor, ...]:
        lead = lead or self.lead
        arguments = {"d": self.d, "grad": self.grad, "dtypes": self.dtypes} | arguments
        inputs = make_inputs(self.fn, lead=lead, dtype=self.dtype, device=device, **arguments)
        if self.dynamic == "rows":
            for t in inputs:
                for i in range(len(lead) if t.shape[:-1] == lead else 0):
                    torch._dynamo.maybe_mark_dynamic(t, i)
        return inputs


FP16, BF16 = torch.float16, torch.bfloat16

FORMS = [
    Form("2d-fp32", linear),
    Form("2d-bf16", linear, dtype=BF16),
    Form("2d-fp16", linear, dtype=FP16),
    Form("2d-value-first", value_first, dtype=BF16),
    Form("3d", linear, lead=(2, 3), dtype=BF16),
    Form("3d-fp32-value-first", value_first, lead=(2, 3)),
    Form("4d", linear, lead=(2, 3, 2)),
    Form("bias-fp32", linear_bias, bias=1),
    Form("bias-bf16", linear_bias, dtype=BF16, bias=1),
    Form("bias-3d", linear_bias, lead=(2, 3), dtype=BF16, bias=1),
    Form("bias-after", bias_after, dtype=BF16, bias=1),
    Form("bias-before-3d", bias_before, lead=(2, 3), bias=1),
    Form("weight-reordered", weight_reordered),
    Form("weight-reordered-sum-bf16", weight_reordered_sum, dtype=BF16),
    Form("addmm", addmm, bias=1),
    Form("bias-scalar", bias_scalar, dtype=BF16, bias=1),
    Form("bias-square", bias_square, bias=1),
    Form("weight-row-of-table", weight_row_of_table, dtype=BF16),
    Form("matmul-t", matmul_t, lead=(2, 3)),
    Form("matmul-col", matmul_col, dtype=BF16),
    Form("mv-unsqueeze", matvec),
    Form("mv-unsqueeze-bf16", matvec, dtype=BF16),
    Form("mv-3d", matvec_late, lead=(2, 3)),
    Form("bmm-batch-1", bmm, lead=(1, 5)),
    Form("einsum", einsum, lead=(2, 3)),
    Form("einsum-vector", einsum_vec, lead=(2, 3), dtype=BF16),
    Form("product-sum", product_sum),
    Form("product-sum-bf16-3d", product_sum, lead=(2, 3), dtype=BF16),
    Form("product-sum-vector", product_sum_vec, dtype=BF16),
    Form("padded", padded),
    Form("padded-columns-bf16", padded_columns, dtype=BF16),
    Form("padded-addmm", padded_addmm, bias=1),
    Form("padded-with-ones", padded_with_ones),
    Form("functional-sigmoid", functional_sigmoid),
    Form("method-sigmoid", method_sigmoid),
    Form("float-cast-back", float_cast_back, dtype=BF16),
    Form("float-no-cast-back", float_no_cast_back, dtype=BF16),
    Form("float-cast-product", float_cast_product, dtype=BF16),
    Form("float-linear", float_linear, dtype=BF16),
    Form("autocast", autocast_linear, autocast=True),
    Form("autocast-value-bf16", autocast_linear, dtypes={"v": BF16}, autocast=True),
    Form("autocast-block-3d", autocast_block, lead=(2, 3), autocast=True),
    Form("mixed-value-fp32", linear, dtype=BF16, dtypes={"v": torch.float32}),
    Form("mixed-value-bf16", linear, dtypes={"v": BF16}),
    Form("addend-first", addend_first, dtype=BF16, addend=1),
    Form("addend-last", addend_last, addend=1),
    Form("addend-3d", addend_first, lead=(2, 3), dtype=BF16, addend=1),
    Form("addend-bias", addend_bias, dtype=BF16, addend=1, bias=1),
    Form("addend-reshaped", addend_reshaped, lead=(2, 3), dtype=BF16, addend=1),
    Form("addend-is-value", addend_is_value, dtype=BF16, addend=1),
    Form("sum-of-two-gates", sum_of_two_gates, dtype=BF16, fused=2, addend=1),
    Form("addend-product-used-twice", addend_product_used_twice),
    Form("addend-depends-on-result", addend_depends_on_result),
    Form("addend-scaled", addend_scaled),
    Form("addend-broadcast", addend_broadcast),
    Form("addend-other-dtype", addend_first, dtype=BF16, dtypes={"r": torch.float32}),
    Form("shared-expert", shared_expert, lead=(2, 3), dtype=BF16, addend=1),
    Form("value-node", value_node),
    Form("value-matmul", value_matmul, dtype=BF16),
    Form("value-is-input", value_is_input),
    Form("value-narrower", linear, d=24),
    Form("value-wider-3d", linear, lead=(2, 3), d=136, dtype=BF16),
    Form("strided-rows", strided_rows, dtype=BF16),
    Form("strided-rows-odd", strided_rows_odd, dtype=BF16),
    Form("strided-rows-3d", strided_rows_odd, lead=(2, 3), dtype=BF16),
    Form("shape-chain", shape_chain),
    Form("shape-chain-expanded", shape_chain_expanded, dtype=BF16),
    Form("rows-then-3d", rows_then_3d, lead=(2, 3)),
    Form("permuted-input", permuted_input, lead=(2, 3)),
    Form("one-token-fp32", linear, lead=(1,)),
    Form("one-token-bf16", linear, lead=(1,), dtype=BF16),
    Form("one-token-bias", linear_bias, lead=(1,), bias=1),
    Form("one-token-bias-bf16", linear_bias, lead=(1,), dtype=BF16, bias=1),
    Form("one-token-3d", linear, lead=(1, 1), dtype=BF16),
    Form("one-token-addend", addend_first, lead=(1,), dtype=BF16, addend=1),
    Form("one-token-mv", matvec, lead=(1,)),
    Form("shared-gate", shared_gate, keeps_logit=1),
    Form("gate-returned", gate_returned, keeps_logit=1),
    Form("logit-returned-bf16", logit_returned, dtype=BF16, keeps_logit=1),
    Form("logit-returned-3d", logit_returned, lead=(2, 3), keeps_logit=1),
    Form("two-layers", two_layers, dtype=BF16, fused=2, addend=2),
    Form("dynamic-n", linear, dynamic="rows", more_leads=((9,), (64,))),
    Form("dynamic-n-bf16-3d", addend_first, (2, 3), BF16, addend=1, dynamic="rows",
         more_leads=((4, 9), (3, 2))),
    Form("dynamic-n-shared-expert", shared_expert_rows, (2, 3), BF16, addend=1, dynamic="rows",
         more_leads=((4, 9),)),
    Form("dynamic-n-rows-then-3d", rows_then_3d_of_input, (2, 3), dynamic="rows",
         more_leads=((4, 9),)),
    Form("dynamic-n-bias", linear_bias, bias=1, dynamic="rows", more_leads=((2,),)),
    Form("dynamic-n-logit", logit_returned, keeps_logit=1, dynamic="rows", more_leads=((17,),)),
    Form("dynamic-n-shape-chain", shape_chain, dynamic="rows", more_leads=((17,),)),
    Form("dynamic-all-rows-then-3d", rows_then_3d, (2, 3), dynamic="all", more_leads=((4, 9),)),
    Form("dynamic-all-shared-expert", shared_expert_rows, (2, 3), BF16, addend=1, dynamic="all",
         more_leads=((4, 9),)),
    Form("dynamic-all", linear, dynamic="all", more_leads=((9,), (64,))),
    Form("dynamic-all-bf16-addend-3d", addend_first, (2, 3), BF16, addend=1, dynamic="all",
         more_leads=((4, 9),)),
    Form("dynamic-all-mv", matvec, dtype=BF16, dynamic="all", more_leads=((17,),)),
    Form("dynamic-all-product-sum", product_sum, dynamic="all", more_leads=((17,),)),
    Form("cdt-fp32", linear, coordinate_descent=True),
    Form("cdt-bf16", linear, dtype=BF16, coordinate_descent=True),
    Form("cdt-3d-value-first", value_first, (2, 3), BF16, coordinate_descent=True),
    Form("cdt-bias-fp32", bias_after, bias=1, coordinate_descent=True),
    Form("cdt-bias-bf16", bias_after, dtype=BF16, bias=1, coordinate_descent=True),
    Form("cdt-addmm", linear_bias, dtype=BF16, bias=1, coordinate_descent=True),
    Form("cdt-addend", addend_first, (2, 3), BF16, addend=1, coordinate_descent=True),
    Form("cdt-addend-reshaped", addend_reshaped, (2, 3), BF16, addend=1, coordinate_descent=True),
    Form("cdt-float-cast-back", float_cast_back, dtype=BF16, coordinate_descent=True),
    Form("cdt-autocast", autocast_linear, autocast=True, coordinate_descent=True),
    Form("cdt-bmm", bmm, lead=(1, 5), dtype=BF16, coordinate_descent=True),
    Form("cdt-einsum", einsum, lead=(2, 3), dtype=BF16, coordinate_descent=True),
    Form("cdt-dynamic", linear, dtype=BF16, coordinate_descent=True, dynamic="rows",
         more_leads=((9,), (33,))),
    Form("cdt-logit-returned", logit_returned, dtype=BF16, keeps_logit=1, coordinate_descent=True),
    Form("train", linear, grad=True, keeps_logit=1),
    Form("train-bf16-bias-3d", linear_bias, (2, 3), BF16, grad=True, bias=1, keeps_logit=1),
    Form("train-addend", addend_first, dtype=BF16, grad=True, addend=1, keeps_logit=1),
    Form("train-autocast", autocast_block, (2, 3), grad=True, keeps_logit=1, autocast=True),
    Form("train-shared-expert", shared_expert, (2, 3), grad=True, addend=1, keeps_logit=1),
    Form("train-dynamic", linear, grad=True, dynamic="rows", keeps_logit=1, more_leads=((9,),)),
    Form("train-product-sum", product_sum, grad=True, keeps_logit=1),
    Form("train-one-token", linear, lead=(1,), dtype=BF16, grad=True, keeps_logit=1),
    Form("train-shared-gate", shared_gate, grad=True, keeps_logit=1),
    Form("train-sum-of-two-gates", sum_of_two_gates, grad=True, fused=2, addend=1, keeps_logit=2),
    Form("train-two-layers", two_layers, grad=True, fused=2, addend=2, keeps_logit=2),
    Form("train-checkpoint", checkpointed, grad=True, backward=1),
    Form("train-checkpoint-bf16", checkpointed, (2, 3), BF16, grad=True, backward=1),
    Form("cdt-train-shared-gate", shared_gate, grad=True, keeps_logit=1, coordinate_descent=True),
    Form("cdt-train-shared-expert", shared_expert, (2, 3), BF16, grad=True, addend=1, keeps_logit=1,
         coordinate_descent=True),
    Form("cdt-train", linear, grad=True, keeps_logit=1, coordinate_descent=True),
    Form("cdt-train-bf16", linear, dtype=BF16, grad=True, keeps_logit=1, coordinate_descent=True),
    Form("cdt-train-bias-bf16", bias_after, (2, 3), BF16, grad=True, bias=1, keeps_logit=1,
         coordinate_descent=True),
    Form("cdt-train-checkpoint", checkpointed, dtype=BF16, grad=True, backward=1,
         coordinate_descent=True),
]  # fmt: skip
