"""Every form of the gate becomes exactly one op, and computes what eager computes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import gatefuse
from tests.support.comparison import compile_and_compare, run_form
from tests.support.cuda_rewrites import pad_products
from tests.support.form_table import FORMS, Form
from tests.support.forms import (
    addend_first,
    addend_transposed,
    input_transposed,
    linear,
    linear_bias,
    make_inputs,
    rows_then_3d,
    value_transposed,
)
from tests.support.judge import judge
from tests.support.reports import check_report

#: Forms with five or six rows, of each kind of linear that Inductor pads.
_PADDED = ("2d-bf16", "3d-fp32", "bias-fp32", "bias-bf16", "bias-3d", "padded", "padded-addmm")


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.id)
def test_form(form: Form) -> None:
    result = run_form(form)
    check_report(form, result.report)
    result.check(torch.bfloat16 if form.autocast else None)


@pytest.mark.parametrize(
    "form", [f for f in FORMS if f.id in _PADDED and not f.grad], ids=lambda form: form.id
)
def test_padded_products(form: Form) -> None:
    """Where Inductor's own passes pad the linear, and cut the logits out again."""
    with pad_products():
        result = run_form(form)
    (graph,) = result.report.graphs
    assert graph.before is not None and "constant_pad_nd" in graph.before
    assert graph.after is not None and "aten.mm" not in graph.after
    check_report(form, result.report)
    result.check()


def test_padded_product_that_is_saved_for_the_backward() -> None:
    """It is computed all the same, and fusing would compute its logits twice."""
    (form,) = (f for f in FORMS if f.id == "train-shared-expert")
    with pad_products():
        result = run_form(form)
    result.check()
    assert result.report.fused == 0
    assert "needed elsewhere" in result.report.rejections[0].reason


@pytest.mark.parametrize("flat", [False, True], ids=["2d", "flat"])
def test_strides_of_a_logit_that_is_returned(flat: bool) -> None:
    """A column of a wider product keeps its strides, which the op's logit does not have."""

    def fn(x: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        logit = (F.pad(x, (0, 8)) @ F.pad(w.t(), (0, 7, 0, 8)))[:, :1]
        return torch.sigmoid(logit) * v, logit.reshape(-1) if flat else logit

    args = Form("", FORMS[0].fn, lead=(7,)).inputs()[:3]
    with torch.no_grad(), gatefuse.fusing() as report:
        fused = torch.compile(fn)(*args)
    with torch.no_grad():
        torch._dynamo.reset()
        plain = torch.compile(fn)(*args)
    assert [t.stride() for t in fused] == [t.stride() for t in plain]
    assert [("strides" in r.reason) for r in report.rejections] == [True]


def test_table_ids_are_unique() -> None:
    assert len({form.id for form in FORMS}) == len(FORMS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_site_describes_shapes(dtype: torch.dtype) -> None:
    form = Form("", FORMS[0].fn, lead=(7,), d=24, dtype=dtype)
    (site,) = run_form(form).report.sites
    assert (site.rows, site.H, site.D) == ("7", "64", "24")
    assert site.dtype == str(dtype).removeprefix("torch.")


def test_empty_rows() -> None:
    form = Form("", FORMS[0].fn, lead=(0,), dtype=torch.bfloat16)
    run_form(form).check()


def test_symbols_that_only_multiply_to_the_same_rows() -> None:
    """Input and value with row counts that are equal, but not provably so: fused or left alone
    with a reason, right in both cases."""
    form = Form("", rows_then_3d, lead=(2, 3), dynamic="rows", more_leads=((4, 9),))
    result = run_form(form)
    result.check()
    assert len(result.report.rejections) == 1 - result.report.fused
    assert all(r.reason for r in result.report.rejections)


def test_tolerance_notices_a_lost_bias() -> None:
    """The tolerance is tight enough to tell a gate from one whose bias is 0.05 off."""
    x, w, v, b = make_inputs(linear_bias, dtype=torch.bfloat16, lead=(16,))
    eager = linear_bias(x, w, v, b)
    reference = linear_bias(x.double(), w.double(), v.double(), b.double())
    judge("right", eager, eager, reference)
    with pytest.raises(AssertionError, match="norm error"):
        judge("wrong", linear_bias(x, w, v, b + 0.05), eager, reference)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("lead", [(5,), (2, 3)], ids=["2d", "3d"])
@pytest.mark.parametrize("fn", [value_transposed, input_transposed, addend_transposed])
def test_unusual_strides(fn: Callable[..., Tensor], lead: tuple[int, ...], grad: bool) -> None:
    """Rows that are not contiguous: fused or left alone, with eager's strides in both cases."""
    result = run_form(Form("", fn, lead=lead, grad=grad))
    result.check()
    graph = result.report.graphs[0]
    assert graph.fused + len(graph.rejections) == 1


def test_an_addend_with_other_strides_is_left_outside() -> None:
    """The sum follows the addend's strides, which the op cannot promise; the gate is fused."""
    x, w, v, r = make_inputs(addend_first)
    result = compile_and_compare(addend_first, (x, w, v, r.t().contiguous().t()))
    result.check()
    (site,) = result.report.sites
    assert not site.has_addend


def test_rows_cut_off_or_padded() -> None:
    """Fewer or more rows between linear and multiply: fused or left alone, right in both cases."""

    def cut(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        return torch.sigmoid(F.linear(x, w)[:3]) * v[:3]

    def padded(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        return torch.sigmoid(F.pad(x[:3], [0, 0, 0, 2]) @ w.t()) * v

    for fn in (cut, padded):
        result = compile_and_compare(fn, make_inputs(linear))
        result.check()
        (graph,) = result.report.graphs
        assert graph.fused + len(graph.rejections) == 1


def test_rows_that_depend_on_data() -> None:
    """A number of rows that is known at run time only, as behind a mask."""

    def masked(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        keep = v[:, 0] > 0
        return torch.sigmoid(F.linear(x[keep], w)) * v[keep]

    inputs = make_inputs(masked, lead=(16,))
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        result = compile_and_compare(masked, inputs, fullgraph=True)
    result.check()
    (graph,) = result.report.graphs
    assert graph.fused + len(graph.rejections) == 1


def test_gate_in_a_branch() -> None:
    """Sub-graphs of control flow are compiled on their own."""

    def branch(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        gated = torch.cond(x.sum() > 0, linear, lambda x, w, v: torch.tanh(v), (x, w, v))
        return gated + 1

    x, w, v = make_inputs(linear)
    for sign in (1, -1):
        result = compile_and_compare(branch, (sign * x.abs(), w, v), fullgraph=True)
        result.check()
        assert all(r.reason for r in result.report.rejections)
