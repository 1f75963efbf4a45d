"""The table of forms: sizes, dtypes and what must be fused. Shared by the CPU and the GPU tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from tests.support.forms import (
    H,
    addend_bias,
    addend_broadcast,
    addend_depends_on_result,
    addend_first,
    addend_is_value,
    addend_last,
    addend_product_used_twice,
    addend_reshaped,
    addend_scaled,
    addmm,
    autocast_block,
    autocast_linear,
    bias_after,
    bias_before,
    bias_scalar,
    bias_square,
    bmm,
    checkpointed,
    einsum,
    einsum_vec,
    float_cast_back,
    float_cast_product,
    float_linear,
    float_no_cast_back,
    functional_sigmoid,
    gate_returned,
    linear,
    linear_bias,
    logit_returned,
    make_inputs,
    matmul_col,
    matmul_t,
    matvec,
    matvec_late,
    method_sigmoid,
    padded,
    padded_addmm,
    padded_columns,
    padded_with_ones,
    permuted_input,
    product_sum,
    product_sum_vec,
    rows_then_3d,
    rows_then_3d_of_input,
    shape_chain,
    shape_chain_expanded,
    shared_expert,
    shared_expert_rows,
    shared_gate,
    strided_rows,
    strided_rows_odd,
    sum_of_two_gates,
    two_layers,
    value_first,
    value_is_input,
    value_matmul,
    value_node,
    weight_reordered,
    weight_reordered_sum,
    weight_row_of_table,
)


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
