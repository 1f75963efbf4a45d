"""The operator: schema, checks, fake, eager dispatch, autograd and an fp64 reference.

``torch.ops.gatefuse.linear_sigmoid_mul(input, weight, value, bias, addend)`` is
``sigmoid(input @ weight.T + bias) * value + addend`` with one logit per row. Products, sums and
the sigmoid are computed in float32 and rounded once. On a CUDA, HIP or XPU device it is one Triton
kernel, elsewhere plain ATen.

``linear_sigmoid_mul_logit`` returns the logits as well; the fusion pass uses it where a graph needs
them, as in training, where the backward reads them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from gatefuse import formulas
from gatefuse.gradients import gradients
from gatefuse.operands import KERNEL_DTYPES, Operands, as_rows, check, check_tensors

__all__ = ["linear_sigmoid_mul", "linear_sigmoid_mul_reference"]

_LIBRARY = torch.library.Library("gatefuse", "DEF")
_LIBRARY.define(
    "linear_sigmoid_mul(Tensor input, Tensor weight, Tensor value, Tensor? bias=None,"
    " Tensor? addend=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "linear_sigmoid_mul_logit(Tensor input, Tensor weight, Tensor value, Tensor? bias=None,"
    " Tensor? addend=None, *, ScalarType logit_dtype) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _aten(operands: Operands) -> tuple[Tensor, Tensor]:
    dtype = operands.result_dtype()
    out, logit = formulas.value_and_logit(operands, torch.promote_types(torch.float32, dtype))
    return out.to(dtype), logit


def _row_ordered(t: Tensor) -> bool:
    """Whether an elementwise result of ``t`` is contiguous by PyTorch's stride rule."""
    if t.is_contiguous():
        return True
    strides = [s for n, s in zip(t.shape, t.stride()) if n != 1]
    return all(a >= b > 0 for a, b in zip(strides, strides[1:]))


class _Launch(NamedTuple):
    """Where a kernel that read a weight was launched: version of the weight, stream, capture."""

    version: int
    stream: int
    capturing: bool


_seen = WeakTensorKeyDictionary()


def _settled(weight: Tensor, stream: int, capturing: bool) -> bool:
    """Whether the kernel that runs just before a launch cannot be the one that wrote ``weight``: it
    is a parameter, and an earlier launch has waited for what is in it now.

    That launch was on the same stream, or, where this one is being captured, before the capture: a
    graph starts when all that was launched before has ended.
    """
    if not isinstance(weight, torch.nn.Parameter) or weight.is_inference():
        return False
    now = _Launch(weight._version, stream, capturing)
    before: _Launch | None = _seen.get(weight)
    if before is not None and (
        before == now or (before.version == now.version and now.capturing and not before.capturing)
    ):
        return True
    _seen[weight] = now
    return False


def _triton(
    operands: Operands, logit_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None] | None:
    """The kernel's result (and logits ``[..., 1]``), or None where ATen has to serve."""
    input, weight, value, bias, addend = operands
    try:
        from gatefuse import kernels
    except ImportError:  # a device without Triton
        return None
    if not KERNEL_DTYPES.issuperset(t.dtype for t in operands.present()):
        return None
    if not (_row_ordered(value) and (addend is None or _row_ordered(addend))):
        return None
    rows, value_rows = as_rows(input), as_rows(value)
    addend_rows = None if addend is None else as_rows(addend)
    out = torch.empty(value.shape, dtype=operands.result_dtype(), device=value.device)
    logit = None
    if logit_dtype is not None:
        logit = torch.empty(*input.shape[:-1], 1, dtype=logit_dtype, device=value.device)
    pdl = value.device.type == "cuda" and kernels.supports_pdl(value.device.index or 0)
    weight_row = weight.contiguous()
    with torch.get_device_module(value.device.type).device(value.device):
        weight_first = (
            pdl
            and weight_row is weight
            and _settled(
                weight,
                torch.cuda.current_stream().cuda_stream,
                torch.cuda.is_current_stream_capturing(),
            )
        )
        kernels.launch(
            rows,
            weight_row,
            value_rows,
            bias,
            addend_rows,
            out.view(value_rows.shape),
            None if logit is None else logit.view(-1),
            pdl=pdl,
            weight_first=weight_first,
            batch_invariant=formulas.batch_invariant(),
        )
    return out, logit


def _run(
    operands: Operands, logit_dtype: torch.dtype | None, *, gpu: bool
) -> tuple[Tensor, Tensor | None]:
    check(operands)
    result = _triton(operands, logit_dtype) if gpu else None
    if result is None:
        out, logit = _aten(operands)
        result = out, None if logit_dtype is None else logit.to(logit_dtype)
    return result


def _implement(key: str, gpu: bool) -> None:
    def linear_sigmoid_mul(*args: Tensor | None, **kwargs: Tensor | None) -> Tensor:
        return _run(Operands(*args, **kwargs), None, gpu=gpu)[0]

    def linear_sigmoid_mul_logit(
        *args: Tensor | None, logit_dtype: torch.dtype, **kwargs: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        return _run(Operands(*args, **kwargs), logit_dtype, gpu=gpu)

    for function in (linear_sigmoid_mul, linear_sigmoid_mul_logit):
        _LIBRARY.impl(function.__name__, function, key)


_implement("CompositeExplicitAutograd", gpu=False)
for _key in ("CUDA", "XPU"):  # HIP devices dispatch as CUDA
    _implement(_key, gpu=True)


def _cast_like_autocast(operands: Operands, device_type: str) -> Operands:
    """What the linear of the unfused gate reads under autocast."""
    dtype = torch.get_autocast_dtype(device_type)

    def cast(t: Tensor | None) -> Tensor | None:
        return t if t is None or t.dtype == torch.float64 else t.to(dtype)

    return operands._replace(
        input=cast(operands.input), weight=cast(operands.weight), bias=cast(operands.bias)
    )


def _implement_autocast(op: torch._ops.OpOverload, key: str, device_type: str) -> None:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def autocast(
        input: Tensor,
        weight: Tensor,
        value: Tensor,
        bias: Tensor | None = None,
        addend: Tensor | None = None,
        **rest: Any,
    ) -> Any:
        operands = Operands(input, weight, value, bias, addend)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return op(*_cast_like_autocast(operands, device_type), **rest)

    _LIBRARY.impl(op._schema.name.split("::")[1], autocast, key)


for _key in ("CPU", "CUDA", "XPU"):
    for _name in ("linear_sigmoid_mul", "linear_sigmoid_mul_logit"):
        _op = getattr(torch.ops.gatefuse, _name).default
        _implement_autocast(_op, f"Autocast{_key}", _key.lower())

before_tracing: Callable[[], None] = lambda: None  # noqa: E731
"""Called when the op is traced: in a graph for Inductor it needs its lowering, whoever put it
there, or it would be an opaque call. Set by the package, for lowerings are further up."""


@torch.library.register_fake("gatefuse::linear_sigmoid_mul", lib=_LIBRARY)
def _fake(*args: Tensor | None, **kwargs: Tensor | None) -> Tensor:
    operands = Operands(*args, **kwargs)
    check(operands)
    before_tracing()
    # Dtype and strides are those of the unfused product and sum.
    linear = operands._replace(value=None, addend=None)
    value = operands.value
    gate = torch.empty([*value.shape[:-1], 1], dtype=linear.result_dtype(), device=value.device)
    out = gate * value
    return out if operands.addend is None else out + operands.addend


@torch.library.register_fake("gatefuse::linear_sigmoid_mul_logit", lib=_LIBRARY)
def _fake_logit(
    *args: Tensor | None, logit_dtype: torch.dtype, **kwargs: Tensor | None
) -> tuple[Tensor, Tensor]:
    out = _fake(*args, **kwargs)
    input = Operands(*args, **kwargs).input
    return out, torch.empty([*input.shape[:-1], 1], dtype=logit_dtype, device=input.device)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    # Not the logits: the backward reads the input anyway, for the weight's gradient.
    input, weight, value, bias, addend = Operands(*inputs)
    ctx.save_for_backward(input, weight, value, bias)
    ctx.addend_dtype = None if addend is None else addend.dtype


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    needed = Operands(*ctx.needs_input_grad)
    grads = gradients(grad, Operands(*ctx.saved_tensors), needed)
    return grads._replace(addend=grad.to(ctx.addend_dtype) if needed.addend else None)


torch.library.register_autograd(
    "gatefuse::linear_sigmoid_mul", _backward, setup_context=_setup_context, lib=_LIBRARY
)


def linear_sigmoid_mul(
    input: Tensor,
    weight: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    addend: Tensor | None = None,
) -> Tensor:
    """``sigmoid(linear(input, weight, bias)) * value + addend``, one gate per row.

    input: ``[..., H]``; weight: ``[1, H]``; value: ``[..., D]`` with the leading dimensions of
    input; bias: ``[1]`` or None; addend: shape of value, or None. dtypes: float16, bfloat16,
    float32 or float64, which may differ. Returns a tensor of value's shape in the promoted dtype,
    computed in float32 (float64 if any argument is) and rounded once. Under autocast input, weight
    and bias are cast as for a linear. Differentiable, also in
    forward mode and under the transforms of torch.func.

    Raises ValueError on a wrong shape or device, TypeError on a wrong dtype or no tensor.
    """
    operands = Operands(input, weight, value, bias, addend)
    check_tensors(operands)
    if value.shape[:-1] != input.shape[:-1]:
        raise ValueError(
            f"gatefuse: value has shape {list(value.shape)}; expected the leading dimensions of "
            f"input {list(input.shape)}"
        )
    if _transformed():
        check(operands)
        device = input.device.type
        if torch.is_autocast_enabled(device):
            operands = _cast_like_autocast(operands, device)
        with torch.autocast(device, enabled=False):
            return _aten(operands)[0]
    return torch.ops.gatefuse.linear_sigmoid_mul.default(*operands)


def _transformed() -> bool:
    """Whether forward-mode AD or a transform of torch.func is at work. A custom op would drop the
    tangents of the one without a word, and fails under the other; ATen knows both."""
    return (
        torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    )


def linear_sigmoid_mul_reference(
    input: Tensor,
    weight: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    addend: Tensor | None = None,
) -> Tensor:
    """The same in float64 without any rounding in between: what a test compares with."""
    operands = Operands(input, weight, value, bias, addend)
    check_tensors(operands)
    check(operands)
    return formulas.value_and_logit(operands, torch.float64)[0]
