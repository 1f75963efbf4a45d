"""On a GPU: the forms in Inductor's modes, each placement, CUDA graphs, the op eagerly."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor_config
from torch import Tensor

import gatefuse
from tests.support.comparison import BACKEND, compile_and_compare, run_form
from tests.support.form_table import BF16, FORMS, FP16, Form
from tests.support.forms import (
    addend_bias,
    addend_first,
    linear,
    linear_bias,
    logit_returned,
    make_inputs,
    shared_expert_rows,
)
from tests.support.judge import judge
from tests.support.reports import check_report

pytestmark = pytest.mark.gpu
DEVICE = "cuda"

#: Forms that exist only on the CPU: there one token and emulated decompositions look different.
_GPU_FORMS = [form for form in FORMS if not form.coordinate_descent]
#: One form of each kind, for what is slow to compile.
_SOME = [
    form
    for form in FORMS
    if form.id
    in (
        "2d-bf16",
        "bias-3d",
        "mv-unsqueeze-bf16",
        "product-sum-bf16-3d",
        "float-cast-back",
        "autocast-block-3d",
        "addend-reshaped",
        "shared-expert",
        "value-narrower",
        "strided-rows",
        "one-token-bias-bf16",
        "logit-returned-bf16",
        "two-layers",
        "dynamic-n-shared-expert",
        "dynamic-all-bf16-addend-3d",
        "train-shared-expert",
        "train-bf16-bias-3d",
        "train-checkpoint-bf16",
    )
]


@pytest.fixture(autouse=True, scope="module")
def _full_precision() -> Iterator[None]:
    """float32 matmuls in float32, so that eager sets a meaningful bound."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture(autouse=True)
def _no_padding() -> Iterator[None]:
    """Whether Inductor pads a product depends on times; test_forms.py has padded ones."""
    with inductor_config.patch(shape_padding=False):
        yield


def check(form: Form, **arguments: Any) -> gatefuse.Report:
    arguments.setdefault("options", {"placement": form.gpu_placement})
    result = run_form(form, DEVICE, **arguments)
    check_report(form, result.report)
    result.check(BF16 if form.autocast else None)
    return result.report


@pytest.mark.parametrize("form", _GPU_FORMS, ids=lambda form: form.id)
def test_default(form: Form) -> None:
    for site in check(form).sites:
        assert site.placement in ("inline", "kernel")
        assert site.placement_reason


@pytest.mark.parametrize("form", _SOME, ids=lambda form: form.id)
def test_coordinate_descent(form: Form) -> None:
    with inductor_config.patch(coordinate_descent_tuning=True):
        check(form)


@pytest.mark.parametrize("form", _SOME[::2], ids=lambda form: form.id)
def test_max_autotune(form: Form) -> None:
    check(form, mode="max-autotune-no-cudagraphs")


@pytest.mark.parametrize("placement", ["inline", "kernel"])
@pytest.mark.parametrize("form", _SOME, ids=lambda form: form.id)
def test_placement(form: Form, placement: str) -> None:
    report = check(form, options={"placement": placement})
    # A kernel with a symbolic width would lose its vectorised loads: that is inline.
    expected = "inline" if form.dynamic == "all" else placement
    assert {site.placement for site in report.sites} == {expected}
    assert all(site.placement_reason for site in report.sites)


def test_symbolic_width_is_left_alone() -> None:
    (form,) = (form for form in _SOME if form.dynamic == "all")
    result = run_form(form, DEVICE)
    result.check()
    assert result.report.fused == 0
    assert "symbolic" in result.report.rejections[0].reason


@pytest.mark.parametrize("placement", ["auto", "inline", "kernel"])
@pytest.mark.parametrize("fn", [addend_bias, shared_expert_rows], ids=lambda fn: fn.__name__)
def test_cuda_graphs(fn: Any, placement: str) -> None:
    """Replayed several times with new data in new tensors."""
    sets = [make_inputs(fn, lead=(4, 8), dtype=BF16, device=DEVICE, seed=i) for i in range(4)]
    result = compile_and_compare(
        fn,
        sets[0],
        more_inputs=tuple(sets[1:]),
        options={"placement": placement},
        mode="reduce-overhead",
        fullgraph=True,
    )
    result.check()
    assert result.report.fused == 1


@pytest.mark.parametrize("placement", ["inline", "kernel"])
@pytest.mark.parametrize(
    ("fn", "dynamic"), [(addend_bias, False), (addend_bias, True), (logit_returned, False)]
)
def test_cpp_wrapper(fn: Any, dynamic: bool, placement: str) -> None:
    more = (make_inputs(fn, lead=(9,), dtype=BF16, device=DEVICE),) if dynamic else ()
    with inductor_config.patch(cpp_wrapper=True):
        result = compile_and_compare(
            fn,
            make_inputs(fn, dtype=BF16, device=DEVICE),
            more_inputs=more,
            dynamic=dynamic,
            options={"placement": placement},
        )
    result.check()
    assert result.report.fused == 1


@pytest.mark.parametrize("placement", ["inline", "kernel"])
def test_dynamic_rows_at_many_sizes(placement: str) -> None:
    """One compilation serves decode and prefill sizes, a real width, an odd one among the rows."""
    form = Form("", addend_first, lead=(16,), dtype=BF16, addend=1, dynamic="rows")
    sizes = [(n,) for n in (2, 33, 1000, 8192)]
    result = compile_and_compare(
        form.fn,
        form.inputs(DEVICE, h=2048, d=2048),
        more_inputs=tuple(form.inputs(DEVICE, lead=n, h=2048, d=2048) for n in sizes),
        dynamic=None,
        options={"placement": placement},
    )
    check_report(form, result.report)
    result.check()


@pytest.mark.parametrize("placement", ["auto", "kernel"])
@pytest.mark.parametrize("h", [7, 100, 2560, 7168])
def test_widths(h: int, placement: str) -> None:
    inputs = make_inputs(linear_bias, lead=(37,), dtype=BF16, device=DEVICE, h=h, d=h + 1)
    result = compile_and_compare(linear_bias, inputs, options={"placement": placement})
    result.check()
    assert result.report.fused == 1


def test_backend_by_mode() -> None:
    inputs = make_inputs(linear, dtype=BF16, device=DEVICE, lead=(64,))
    with torch.no_grad(), gatefuse.record() as report:
        result = torch.compile(linear, backend=BACKEND, mode="max-autotune")(*inputs)
    judge("result", result, linear(*inputs), linear(*(t.double() for t in inputs)))
    assert report.fused == 1


def test_eager_rounding_is_nearer_to_eager() -> None:
    inputs = make_inputs(addend_first, dtype=BF16, device=DEVICE, lead=(512,))
    eager = addend_first(*inputs)
    differing = {}
    for rounding in (False, True):
        result = compile_and_compare(addend_first, inputs, options={"eager_rounding": rounding})
        differing[rounding] = (result.fused[0] != eager).double().mean().item()
    assert differing[True] < 0.01 < differing[False]


# --- the op, eagerly ----------------------------------------------------------------------------


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that nobody wrote is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("extras", [(), ("bias",), ("addend",), ("bias", "addend")], ids=str)
@pytest.mark.parametrize(
    ("lead", "h", "d"),
    [((1,), 2048, 2048), ((16,), 2048, 2048), ((3, 5), 100, 7), ((300,), 4096, 4096),
     ((5000,), 64, 64), ((0,), 64, 64), ((9,), 5120, 1000), ((4,), 20_000, 3)],
    ids=str,
)  # fmt: skip
def test_op_eagerly(
    lead: tuple[int, ...], h: int, d: int, extras: tuple[str, ...], dtype: torch.dtype
) -> None:
    x, w, v, b, r = make_inputs(addend_bias, lead=lead, dtype=dtype, device=DEVICE, h=h, d=d)
    arguments: dict[str, Tensor] = {"bias": b, "addend": r}
    kept = {name: arguments[name] for name in extras}
    result = gatefuse.linear_sigmoid_mul(x, w, v, **kept)
    reference = gatefuse.linear_sigmoid_mul_reference(x, w, v, **kept)
    eager = torch.sigmoid(torch.nn.functional.linear(x, w, kept.get("bias"))) * v
    if "addend" in kept:
        eager = r + eager
    assert not result.isnan().any()
    judge("result", result, eager, reference)


@pytest.mark.usefixtures("poisoned")
def test_op_eagerly_with_strides() -> None:
    x, w, v = make_inputs(linear, lead=(33,), dtype=BF16, device=DEVICE, h=512, d=512)
    wide = torch.cat([x, v], dim=1)
    result = gatefuse.linear_sigmoid_mul(wide[:, :512], w, wide[:, 512:])
    assert torch.equal(result, gatefuse.linear_sigmoid_mul(x, w, v))
    turned = x.t().contiguous().t()
    assert torch.equal(gatefuse.linear_sigmoid_mul(turned, w, v), result)
    every_second = torch.stack([x, x], dim=1).flatten(0, 1)[::2]
    assert torch.equal(gatefuse.linear_sigmoid_mul(every_second, w, v), result)


def test_op_gradients_on_the_gpu() -> None:
    x, w, v, b, r = make_inputs(
        addend_bias, dtype=torch.float64, device=DEVICE, h=9, d=5, grad=True
    )

    def op(x: Tensor, w: Tensor, v: Tensor, b: Tensor, r: Tensor) -> Tensor:
        return gatefuse.linear_sigmoid_mul(x, w, v, b, r)

    assert torch.autograd.gradcheck(op, (x, w, v, b, r))


@pytest.mark.parametrize("h", [2048, 4096, 7168])
def test_batch_invariance(h: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row's result is the same, bit for bit, alone and among many: compiled and eager."""
    monkeypatch.setenv("GATEFUSE_BATCH_INVARIANT", "1")
    x, v = (torch.randn(1024, h, device="cuda", dtype=BF16) for _ in range(2))
    w = torch.randn(1, h, device="cuda", dtype=BF16) * h**-0.5

    def gate(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(torch.nn.functional.linear(x, w)) * v

    def compiled(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        torch._dynamo.reset()
        options = {"gatefuse.placement": "kernel"}
        return torch.compile(gate, backend=BACKEND, dynamic=False, options=options)(x, v)

    def eager(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return gatefuse.linear_sigmoid_mul(x, w, v)

    for run in (compiled, eager):
        with torch.no_grad():
            whole = run(x, v)
            for rows in (1, 16, 256):
                assert torch.equal(run(x[:rows], v[:rows]), whole[:rows])


def test_autocast_as_the_unfused_gate_on_the_gpu() -> None:
    x, v = (torch.randn(64, 256, device="cuda") for _ in range(2))
    w = torch.randn(1, 256, device="cuda") / 16
    with torch.autocast("cuda", torch.float16):
        want = torch.sigmoid(torch.nn.functional.linear(x, w)) * v.half()
        got = gatefuse.linear_sigmoid_mul(x, w, v.half())
    assert got.dtype == want.dtype == torch.float16
    torch.testing.assert_close(got, want, rtol=5e-3, atol=5e-3)
