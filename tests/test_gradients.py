"""The gradients of the op: by its formula, by its op, and by the Triton kernels."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import textwrap
from unittest import mock

import pytest
import torch
from torch import Tensor

import gatefuse
from gatefuse import formulas
from gatefuse.operands import Operands

OP = torch.ops.gatefuse.linear_sigmoid_mul_backward.default
ALL = (True, True, True, True)

CASES = [
    # rows, H, D, dtype, row stride beyond the width, bias, needed (in the op's order)
    (3, 64, 64, "float32", 0, False, ALL),
    (7, 64, 64, "bfloat16", 8, True, ALL),
    (5, 100, 36, "float16", 4, True, ALL),
    (5, 2560, 2560, "bfloat16", 0, False, ALL),
    (2, 1, 5, "float32", 0, True, ALL),
    (1, 130, 130, "float32", 2, True, ALL),
    (0, 64, 48, "float32", 0, True, ALL),
    (6, 64, 48, "bfloat16", 0, False, (True, False, True, False)),
    (6, 64, 48, "bfloat16", 0, True, (False, True, False, False)),
    (6, 64, 48, "float32", 0, True, (False, False, True, False)),
    (6, 64, 48, "float32", 0, True, (False, False, False, True)),
    (6, 64, 48, "float32", 0, True, (True, False, False, False)),
]


def check_kernel(device, rows, h, d, dtype, extra, bias, needed, multiprocessors=2):
    """The kernels' and eager's errors against float64, for each gradient that is needed."""
    from gatefuse import backward_kernel

    dtype = getattr(torch, dtype)

    def make(n, width):
        return torch.randn(n, width + extra, device=device).to(dtype)[:, :width]

    grad, v, x = make(rows, d), make(rows, d), make(rows, h)
    w = (torch.randn(1, h, device=device) / h**0.5).to(dtype)
    b = torch.randn(1, device=device).to(dtype) if bias else None
    operands, needed = Operands(x, w, v, b), (*needed[:3], needed[3] and bias)

    def launch():
        out = [
            torch.full(t.shape, torch.nan, dtype=dtype, device=device) if need else None
            for t, need in zip((x, w, v, b), needed)
        ]
        backward_kernel.launch(
            grad, v, x, w, b, out[2], out[0], out[1], out[3], multiprocessors=multiprocessors,
        )  # fmt: skip
        return out

    outputs, again = launch(), launch()
    wide = Operands(*(t if t is None else t.double() for t in operands))
    exact = formulas.gradients(grad.double(), wide, Operands(*needed))
    eager = eager_gradients(grad, operands)
    # Of few rows eager's error is few draws, and a sum that cancels tells little of its addends:
    # float32's epsilon of their magnitudes is allowed as well.
    gate = torch.sigmoid(torch.nn.functional.linear(*wide[:2], wide.bias))
    dots = (grad.double() * wide.value).abs().sum(-1, keepdim=True) * gate * (1 - gate)
    sums = dots * wide.weight.abs(), dots.T @ wide.input.abs(), torch.zeros(1), dots.sum()
    errors = []
    for i, (out, twice, ref, unfused) in enumerate(zip(outputs, again, exact, eager)):
        if out is None:
            continue
        assert torch.equal(out, twice)
        assert (out.shape, out.dtype) == (ref.shape, dtype)
        off, allowed = (out.double() - ref).abs(), (unfused.double() - ref).abs()
        eps = torch.finfo(dtype).eps * ref.abs() + torch.finfo(torch.float32).eps * sums[i].to(ref)
        if not out.numel():
            continue
        errors.append([off.norm(), 2 * allowed.norm() + eps.norm()])
        errors.append([off.max(), 2 * allowed.max() + eps.max()])
    return [[float(a), float(b)] for a, b in errors]


def eager_gradients(grad, operands):
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in operands[:4]]
    x, w, v, b = leaves
    out = torch.sigmoid(torch.nn.functional.linear(x, w, b)) * v
    found = iter(torch.autograd.grad(out, [t for t in leaves if t is not None], grad))
    return [None if t is None else next(found) for t in leaves]


def within(errors):
    return errors and all(error <= allowed for error, allowed in errors)


@pytest.fixture(scope="module")
def interpreted():
    """All cases in one process that has Triton's interpreter on, as it is chosen at import."""
    pytest.importorskip("triton")
    script = textwrap.dedent(
        """
        import json, sys, torch
        from tests.test_gradients import CASES, check_kernel
        torch.manual_seed(0)
        errors = [check_kernel("cpu", *case) for case in CASES]
        many = 300, 16, 16, "float32", 0, True, (True,) * 4  # parts for two blocks of their sum
        errors.append(check_kernel("cpu", *many, multiprocessors=100))
        json.dump(errors, sys.stdout)
        """
    )
    run = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    if "only 0-dimensional arrays can be converted" in run.stderr:
        pytest.skip(
            "this Triton's interpreter cannot count to a number in a tensor of this NumPy's"
        )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("i", range(len(CASES) + 1))
def test_interpreted(interpreted, i):
    assert within(interpreted[i]), interpreted[i]


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case[:6])))
def test_on_a_gpu(case):
    assert within(check_kernel("cuda", *case))


@pytest.mark.gpu
@pytest.mark.parametrize("rows, h", [(4097, 2048), (300, 7168), (1025, 1000)])
def test_many_rows_on_a_gpu(rows, h):
    case = rows, h, h, "bfloat16", 0, True, ALL
    assert within(check_kernel("cuda", *case, multiprocessors=132))


def operands(rows=6, h=8, d=5, dtype=torch.float32, bias=True, **how):
    made = torch.randn(rows, h), torch.randn(1, h), torch.randn(rows, d), torch.randn(1)
    return [t.to(dtype).requires_grad_() for t in made[: 4 if bias else 3]]


@pytest.mark.parametrize("needed", list(itertools.product((True, False), repeat=4)))
def test_of_the_gradients_only_those_are_computed_that_are_needed(needed):
    leaves = [t.detach().requires_grad_(need) for t, need in zip(operands(), needed)]
    out = gatefuse.linear_sigmoid_mul(*leaves)
    if not any(needed):
        assert not out.requires_grad
        return
    calls = []
    with torch.utils._python_dispatch._disable_current_modes():
        real = formulas.gradients
        with mock.patch.object(formulas, "gradients", lambda *a: calls.append(a[2]) or real(*a)):
            out.sum().backward()
    assert [t.grad is not None for t in leaves] == list(needed)
    assert [tuple(call[:4]) for call in calls] == [needed]
    for t, want in zip(leaves, eager_gradients(torch.ones_like(out), Operands(*leaves))):
        if t.grad is not None:
            torch.testing.assert_close(t.grad, want)


def test_second_derivatives():
    leaves = operands(3, 4, 5, torch.float64)
    assert torch.autograd.gradcheck(gatefuse.linear_sigmoid_mul, leaves)
    assert torch.autograd.gradgradcheck(gatefuse.linear_sigmoid_mul, leaves)


@pytest.mark.parametrize("bias", [True, False])
def test_the_op_is_one(bias):
    leaves = [t.detach() for t in operands(bias=bias)]
    arguments = (torch.randn(6, 5), *leaves, *([] if bias else [None]), [*ALL[:3], bias])
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(OP, arguments, test_utils=checks)


def test_mixed_dtypes_keep_their_own():
    x, w, v, b = operands()
    leaves = [x.bfloat16(), w, v.half(), b.bfloat16()]
    leaves = [t.detach().requires_grad_() for t in leaves]
    gatefuse.linear_sigmoid_mul(*leaves).sum().backward()
    for t, reference in zip(leaves, (x, w, v, b)):
        assert t.grad.dtype == t.dtype
        assert t.grad.shape == reference.shape


def test_under_autocast_gradients_are_those_of_the_unfused_gate():
    leaves, others = operands(), operands()
    for t, other in zip(leaves, others):
        other.data.copy_(t)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gatefuse.linear_sigmoid_mul(*leaves).sum().backward()
        x, w, v, b = others
        (torch.sigmoid(torch.nn.functional.linear(x, w, b)) * v).sum().backward()
    for t, other in zip(leaves, others):
        torch.testing.assert_close(t.grad, other.grad, rtol=0.05, atol=0.05)


def test_a_subclass_and_a_tracer_get_the_formula():
    class Wrapped(Tensor):
        pass

    x, w, v = operands(bias=False)
    with mock.patch.object(
        torch.ops.gatefuse, "linear_sigmoid_mul_backward", side_effect=AssertionError
    ):
        gatefuse.linear_sigmoid_mul(x.as_subclass(Wrapped), w, v).sum().backward()
        compiled = torch.compile(gatefuse.linear_sigmoid_mul, backend="aot_eager")
        compiled(x, w, v).sum().backward()
    assert all(t.grad is not None for t in (x, w, v))
