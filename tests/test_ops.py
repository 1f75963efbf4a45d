"""The op as a function: values against float64, dtypes, strides, gradients, errors."""

from __future__ import annotations

import itertools

import pytest
import torch

import gatefuse
from gatefuse import ops

OP = torch.ops.gatefuse.linear_sigmoid_mul.default
OP_LOGIT = torch.ops.gatefuse.linear_sigmoid_mul_logit.default
EPS = {torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float32: 2**-22}


def operands(lead, h, d, dtype=torch.float32, bias=True, addend=True, device="cpu"):
    def make(*shape):
        return torch.randn(*shape, device=device).to(dtype)

    return {
        "input": make(*lead, h),
        "weight": (torch.randn(1, h, device=device) / h**0.5).to(dtype),
        "value": make(*lead, d),
        "bias": make(1) if bias else None,
        "addend": make(*lead, d) if addend else None,
    }


def eager(input, weight, value, bias=None, addend=None):
    out = torch.sigmoid(torch.nn.functional.linear(input, weight, bias)) * value
    return out if addend is None else addend + out


def assert_close(out, ops):
    """|out - ref| <= 2 |eager - ref| + eps, in the norm and at the worst element."""
    ref = gatefuse.linear_sigmoid_mul_reference(**ops)
    unfused = eager(**ops)
    eps = EPS[out.dtype] * ref.abs()
    error, allowed = (out.double() - ref).abs(), (unfused.double() - ref).abs()
    assert error.norm() <= 2 * allowed.norm() + eps.norm()
    assert error.max() <= 2 * allowed.max() + eps.max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "lead, h, d", [((5,), 64, 64), ((2, 3), 64, 48), ((), 32, 32), ((2, 1, 3), 100, 7)]
)
@pytest.mark.parametrize("bias, addend", list(itertools.product([True, False], repeat=2)))
def test_values_dtype_and_strides(lead, h, d, dtype, bias, addend):
    ops = operands(lead, h, d, dtype, bias, addend)
    out = gatefuse.linear_sigmoid_mul(**ops)
    want = eager(**ops)
    assert (out.shape, out.dtype, out.stride()) == (want.shape, want.dtype, want.stride())
    assert_close(out, ops)


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows):
    ops = operands((rows,), 16, 16)
    out = gatefuse.linear_sigmoid_mul(**ops)
    assert out.shape == (rows, 16)
    assert_close(out, ops) if rows else None


@pytest.mark.parametrize(
    "value",
    [
        torch.randn(6, 5).t(),
        torch.randn(5, 12)[:, ::2],
        torch.randn(5, 12)[:, :6],
        torch.randn(1, 6).expand(5, 6),
    ],
    ids=["transposed", "strided", "slice", "expanded"],
)
def test_strides_follow_the_unfused_product(value):
    x, w = torch.randn(5, 8), torch.randn(1, 8)
    out, want = gatefuse.linear_sigmoid_mul(x, w, value), eager(x, w, value)
    assert out.stride() == want.stride()
    torch.testing.assert_close(out, want)
    meta = OP(*(t.to("meta") for t in (x, w)), torch.empty_like(value, device="meta"))
    assert meta.shape == want.shape


def test_mixed_dtypes_promote():
    ops = operands((4,), 8, 8, torch.bfloat16)
    ops["value"] = ops["value"].float()
    out = gatefuse.linear_sigmoid_mul(**ops)
    assert out.dtype == eager(**ops).dtype == torch.float32


@pytest.mark.parametrize("bias, addend", list(itertools.product([True, False], repeat=2)))
def test_gradients_against_numerical(bias, addend):
    ops = operands((2, 3), 4, 5, torch.float64, bias, addend)
    args = [None if t is None else t.requires_grad_() for t in ops.values()]
    assert torch.autograd.gradcheck(
        lambda x, w, v, *rest: gatefuse.linear_sigmoid_mul(
            x, w, v, rest[0] if bias else None, rest[-1] if addend else None
        ),
        [t for t in args if t is not None],
    )


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_forward_mode_and_transforms(compiled):
    """A custom op by itself would give zero tangents, and an error under torch.func.grad."""
    ops = operands((3,), 8, 5)
    tangents = [torch.randn_like(t) for t in ops.values()]
    for transform in (
        lambda f: torch.func.jvp(f, tuple(ops.values()), tuple(tangents)),
        lambda f: torch.func.grad(lambda *args: f(*args).square().sum())(*ops.values()),
        lambda f: torch.func.vmap(f, (0, None, 0, None, 0))(*ops.values()),
    ):
        run = torch.compile(transform, fullgraph=True) if compiled else transform
        got = run(gatefuse.linear_sigmoid_mul)
        torch.testing.assert_close(got, transform(eager))
        torch._dynamo.reset()


def test_opcheck():
    ops = operands((2, 3), 8, 5)
    x, w, v, b, a = (t.requires_grad_() for t in ops.values())
    torch.library.opcheck(OP, (x, w, v, b, a))
    torch.library.opcheck(OP, (x, w, v.bfloat16()))
    detached = tuple(t.detach() for t in (x, w, v, b, a))
    torch.library.opcheck(OP_LOGIT, detached, {"logit_dtype": torch.float32})


def test_logit_is_the_rounded_linear():
    ops = operands((7,), 64, 64, torch.bfloat16)
    out, logit = OP_LOGIT(**ops, logit_dtype=torch.bfloat16)
    linear = torch.nn.functional.linear(
        ops["input"].double(), ops["weight"].double(), ops["bias"].double()
    )
    assert logit.shape == (7, 1) and logit.dtype == torch.bfloat16
    torch.testing.assert_close(logit, linear.bfloat16())
    assert_close(out, ops)


BAD = {
    "weight-rows": (ValueError, r"weight has shape \[2, 8\]; expected \[1, 8\]"),
    "weight-width": (ValueError, r"weight has shape \[1, 9\]; expected \[1, 8\]"),
    "bias": (ValueError, r"bias has shape \[3\]; expected \[1\]"),
    "value-rows": (ValueError, r"value has shape \[4, 5\]; expected the leading dimensions"),
    "addend": (ValueError, r"addend has shape \[3, 4\]; expected \[3, 5\]"),
    "input-dtype": (TypeError, r"input has dtype torch.int64; expected one of"),
    "value-device": (ValueError, r"value is on device meta; expected cpu"),
    "value-none": (TypeError, r"value is of type NoneType; expected a Tensor"),
    "bias-number": (TypeError, r"bias is of type float; expected a Tensor or None"),
}


@pytest.mark.parametrize("case", BAD)
def test_errors_name_argument_and_expectation(case):
    ops = {
        "input": torch.randn(3, 8),
        "weight": torch.randn(1, 8),
        "value": torch.randn(3, 5),
        "bias": None,
        "addend": None,
    }
    ops |= {
        "weight-rows": {"weight": torch.randn(2, 8)},
        "weight-width": {"weight": torch.randn(1, 9)},
        "bias": {"bias": torch.randn(3)},
        "value-rows": {"value": torch.randn(4, 5)},
        "addend": {"addend": torch.randn(3, 4)},
        "input-dtype": {"input": torch.ones(3, 8, dtype=torch.int64)},
        "value-device": {"value": torch.empty(3, 5, device="meta")},
        "value-none": {"value": None},
        "bias-number": {"bias": 0.5},
    }[case]
    error, match = BAD[case]
    with pytest.raises(error, match=match):
        gatefuse.linear_sigmoid_mul(**ops)


def test_op_in_a_compiled_function_is_lowered():
    """A model that calls the op itself compiles without the pass, and not to an opaque call."""
    from torch._inductor.utils import run_and_get_code

    ops = operands((6,), 32, 32)
    compiled = torch.compile(lambda **kw: gatefuse.linear_sigmoid_mul(**kw), fullgraph=True)
    out, code = run_and_get_code(compiled, **ops)
    assert_close(out, ops)
    assert "torch.ops.gatefuse" not in "".join(code)


def test_op_in_a_compiled_function_keeps_float64():
    ops = operands((6,), 32, 32, torch.float64)
    ops["input"] = ops["input"].bfloat16()
    out = torch.compile(gatefuse.linear_sigmoid_mul)(**ops)
    torch.testing.assert_close(out, gatefuse.linear_sigmoid_mul_reference(**ops))


def test_op_in_a_compiled_function_rounds_once():
    """The option emulates what eager does, and eagerly the op rounds once."""
    ops = operands((16,), 64, 64, torch.bfloat16, addend=False)
    plain = torch.compile(gatefuse.linear_sigmoid_mul)(**ops)
    torch._dynamo.reset()
    with torch._inductor.config.patch(emulate_precision_casts=True):
        out = torch.compile(gatefuse.linear_sigmoid_mul)(**ops)
    assert torch.equal(out, plain)


def test_a_weight_is_loaded_early_only_if_it_was_waited_for() -> None:
    """Before the grid's dependencies are done, what the kernel before wrote may not be there."""
    weight = torch.nn.Parameter(torch.randn(1, 8))

    def settled(stream: int = 0, capturing: bool = False) -> bool:
        return ops._settled(weight, stream, capturing)

    assert [settled() for _ in range(3)] == [False, True, True]
    with torch.no_grad():
        weight.mul_(2)
    assert [settled(), settled()] == [False, True]
    # The launch on the other stream need not have ended, unless a captured graph starts later.
    assert not settled(stream=1)
    assert settled(stream=2, capturing=True)
    with torch.no_grad():
        weight.mul_(2)
    assert [settled(2, True), settled(2, True), settled(3, True)] == [False, True, False]
    assert not settled(3), "what was captured has not run"
    plain = weight.detach()
    assert not any(ops._settled(plain, 0, False) for _ in range(2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value_dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("parts", [{}, {"bias"}, {"addend"}])
def test_autocast_as_the_unfused_gate(dtype, value_dtype, parts):
    """Eager, compiled and in forward mode: dtype and value are those of the gate it replaces."""
    ops = operands((4,), 16, 16, torch.float32)
    ops = {name: t for name, t in ops.items() if name not in ("bias", "addend") or name in parts}
    ops["value"] = ops["value"].to(value_dtype)

    def plain(input, weight, value, bias=None, addend=None):
        out = torch.sigmoid(torch.nn.functional.linear(input, weight, bias)) * value
        return out if addend is None else out + addend

    with torch.autocast("cpu", dtype):
        want = plain(**ops)
        got = gatefuse.linear_sigmoid_mul(**ops)
        compiled = torch.compile(gatefuse.linear_sigmoid_mul, backend="aot_eager")(**ops)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(ops["input"], torch.ones_like(ops["input"]))
            forward_mode = gatefuse.linear_sigmoid_mul(**{**ops, "input": dual})
    for out in (got, compiled, forward_mode):
        assert out.dtype == want.dtype
        torch.testing.assert_close(out, want, rtol=2e-2, atol=2e-2)


def test_autocast_gradients():
    ops = operands((4,), 16, 16, torch.float32)
    leaves = [t.requires_grad_() for t in ops.values()]
    with torch.autocast("cpu", torch.bfloat16):
        gatefuse.linear_sigmoid_mul(**ops).float().sum().backward()
    for leaf in leaves:
        assert leaf.grad.dtype == leaf.dtype and leaf.grad.abs().sum() > 0
