"""The operator: schema, checks, fake, eager dispatch, autograd and an fp64 reference.

``torch.ops.gatefuse.linear_sigmoid_mul(input, weight, bias, value, addend)`` is
``sigmoid(input @ weight.T + bias) * value + addend`` with one logit per row. Products, sums and
the sigmoid are computed in float32 and rounded once. On a CUDA, HIP or XPU device it is one Triton
kernel, elsewhere plain ATen.

``linear_sigmoid_mul_logit`` returns the logits as well; the fusion pass uses it where a graph needs
them, as in training, where the backward reads them.
"""

from __future__ import annotations

import functools
import math
import sys
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["linear_sigmoid_mul", "linear_sigmoid_mul_reference"]

_LIBRARY = torch.library.Library("gatefuse", "DEF")
_LIBRARY.define(
    "linear_sigmoid_mul(Tensor input, Tensor weight, Tensor? bias, Tensor value, Tensor? addend)"
    " -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "linear_sigmoid_mul_logit(Tensor input, Tensor weight, Tensor? bias, Tensor value,"
    " Tensor? addend, ScalarType logit_dtype) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)

_FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _shape(t: Tensor) -> str:
    return f"[{', '.join(map(str, t.shape))}]"


def _check_tensors(
    input: object, weight: object, bias: object, value: object, addend: object
) -> None:
    named = {"input": input, "weight": weight, "bias": bias, "value": value, "addend": addend}
    for name, t in named.items():
        optional = name in ("bias", "addend")
        if not isinstance(t, Tensor) and not (optional and t is None):
            raise TypeError(
                f"gatefuse: {name} is of type {type(t).__name__}; expected a Tensor"
                f"{' or None' if optional else ''}"
            )


def _check(
    input: Tensor, weight: Tensor, bias: Tensor | None, value: Tensor, addend: Tensor | None
) -> None:
    named = {"input": input, "weight": weight, "bias": bias, "value": value, "addend": addend}
    for name, t in named.items():
        if t is None:
            continue
        if t.dtype not in _FLOAT_DTYPES:
            raise TypeError(
                f"gatefuse: {name} has dtype {t.dtype}; expected one of "
                f"{', '.join(str(d) for d in _FLOAT_DTYPES)}"
            )
        if t.device != input.device:
            raise ValueError(
                f"gatefuse: {name} is on device {t.device}; expected {input.device}, where input is"
            )
    if input.dim() < 1:
        raise ValueError("gatefuse: input is a scalar; expected shape [..., H]")
    if value.dim() < 1:
        raise ValueError("gatefuse: value is a scalar; expected shape [..., D]")
    h = input.shape[-1]
    if weight.dim() != 2 or weight.shape[0] != 1 or weight.shape[1] != h:
        raise ValueError(
            f"gatefuse: weight has shape {_shape(weight)}; expected [1, {h}], one row as wide as "
            f"input {_shape(input)}"
        )
    if bias is not None and (bias.dim() > 1 or bias.numel() != 1):
        raise ValueError(f"gatefuse: bias has shape {_shape(bias)}; expected [1]")
    if math.prod(value.shape[:-1]) != math.prod(input.shape[:-1]):
        raise ValueError(
            f"gatefuse: value has shape {_shape(value)}; expected as many rows as input "
            f"{_shape(input)}"
        )
    if addend is not None and (
        addend.dim() != value.dim() or any(a != b for a, b in zip(addend.shape, value.shape))
    ):
        raise ValueError(
            f"gatefuse: addend has shape {_shape(addend)}; expected {_shape(value)}, as value has"
        )


def result_dtype(*dtypes: torch.dtype | None) -> torch.dtype:
    """The promotion of the operands' dtypes (None for an absent operand): the dtype of the result,
    or, given input, weight and bias alone, that of the linear."""
    return functools.reduce(torch.promote_types, [d for d in dtypes if d is not None])


def _dtypes(*tensors: Tensor | None) -> list[torch.dtype]:
    return [t.dtype for t in tensors if t is not None]


def _compute(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    value: Tensor,
    addend: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Result and logits, both in ``dtype``, in plain ATen."""
    logit = torch.nn.functional.linear(
        input.to(dtype), weight.to(dtype), None if bias is None else bias.reshape(1).to(dtype)
    )
    gate = torch.sigmoid(logit).reshape(*value.shape[:-1], 1)
    out = gate * value.to(dtype)
    return (out if addend is None else out + addend.to(dtype)), logit


def _aten(
    input: Tensor, weight: Tensor, bias: Tensor | None, value: Tensor, addend: Tensor | None
) -> tuple[Tensor, Tensor]:
    dtypes = _dtypes(input, weight, bias, value, addend)
    out, logit = _compute(input, weight, bias, value, addend, result_dtype(torch.float32, *dtypes))
    return out.to(result_dtype(*dtypes)), logit


def _as_rows(t: Tensor) -> Tensor:
    """``t`` as ``[rows, width]`` with inner stride 1: a view where there is one, else a copy."""
    rows = (
        t.reshape(-1, t.shape[-1]) if t.numel() else t.new_empty(t.shape[:-1].numel(), t.shape[-1])
    )
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


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
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    value: Tensor,
    addend: Tensor | None,
    logit_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None] | None:
    """The kernel's result (and logits ``[..., 1]``), or None where ATen has to serve."""
    try:
        from gatefuse import kernels
    except ImportError:  # a device without Triton
        return None
    dtypes = _dtypes(input, weight, bias, value, addend)
    if not kernels.KERNEL_DTYPES.issuperset(dtypes):
        return None
    if not (_row_ordered(value) and (addend is None or _row_ordered(addend))):
        return None
    rows, value_rows = _as_rows(input), _as_rows(value)
    addend_rows = None if addend is None else _as_rows(addend)
    out = torch.empty(value.shape, dtype=result_dtype(*dtypes), device=value.device)
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
            bias,
            value_rows,
            addend_rows,
            out.view(value_rows.shape),
            None if logit is None else logit.view(-1),
            pdl=pdl,
            weight_first=weight_first,
        )
    return out, logit


def _impl(
    input: Tensor, weight: Tensor, bias: Tensor | None, value: Tensor, addend: Tensor | None
) -> Tensor:
    _check(input, weight, bias, value, addend)
    return _aten(input, weight, bias, value, addend)[0]


def _impl_logit(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    value: Tensor,
    addend: Tensor | None,
    logit_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    _check(input, weight, bias, value, addend)
    out, logit = _aten(input, weight, bias, value, addend)
    return out, logit.to(logit_dtype)


def _impl_triton(
    input: Tensor, weight: Tensor, bias: Tensor | None, value: Tensor, addend: Tensor | None
) -> Tensor:
    _check(input, weight, bias, value, addend)
    result = _triton(input, weight, bias, value, addend, None)
    return _aten(input, weight, bias, value, addend)[0] if result is None else result[0]


def _impl_logit_triton(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    value: Tensor,
    addend: Tensor | None,
    logit_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    _check(input, weight, bias, value, addend)
    result = _triton(input, weight, bias, value, addend, logit_dtype)
    if result is None:
        out, logit = _aten(input, weight, bias, value, addend)
        return out, logit.to(logit_dtype)
    assert result[1] is not None
    return result[0], result[1]


for _key in ("CompositeExplicitAutograd", "CUDA", "XPU"):  # HIP devices dispatch as CUDA
    _on_gpu = _key != "CompositeExplicitAutograd"
    _LIBRARY.impl("linear_sigmoid_mul", _impl_triton if _on_gpu else _impl, _key)
    _LIBRARY.impl("linear_sigmoid_mul_logit", _impl_logit_triton if _on_gpu else _impl_logit, _key)


def _prepare_inductor() -> None:
    # A graph that is traced for Inductor needs the op's lowering, whoever put the op there; without
    # it the op would be an opaque call.
    if "torch._inductor.lowering" in sys.modules:
        from gatefuse import compat

        if compat.unsupported_reason() is None:
            from gatefuse import lowering

            lowering.register()


@torch.library.register_fake("gatefuse::linear_sigmoid_mul", lib=_LIBRARY)
def _fake(
    input: Tensor, weight: Tensor, bias: Tensor | None, value: Tensor, addend: Tensor | None
) -> Tensor:
    _check(input, weight, bias, value, addend)
    _prepare_inductor()
    # Dtype and strides are those of the unfused product and sum.
    dtype = result_dtype(*_dtypes(input, weight, bias))
    gate = torch.empty([*value.shape[:-1], 1], dtype=dtype, device=value.device)
    out = gate * value
    return out if addend is None else out + addend


@torch.library.register_fake("gatefuse::linear_sigmoid_mul_logit", lib=_LIBRARY)
def _fake_logit(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    value: Tensor,
    addend: Tensor | None,
    logit_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    out = _fake(input, weight, bias, value, addend)
    return out, torch.empty([*input.shape[:-1], 1], dtype=logit_dtype, device=input.device)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    input, weight, bias, value, addend = inputs
    ctx.save_for_backward(input, weight, bias, value)
    ctx.addend_dtype = None if addend is None else addend.dtype


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    # With s = sigmoid(z): d out / d value = s, d out / d z = value * s * (1 - s).
    input, weight, bias, value = ctx.saved_tensors
    dtype = result_dtype(torch.float32, *_dtypes(input, weight, value, grad))
    g, v, x, w = (t.to(dtype) for t in (grad, value, input, weight))
    z = torch.nn.functional.linear(x, w, None if bias is None else bias.reshape(1).to(dtype))
    s = torch.sigmoid(z)
    need_input, need_weight, need_bias, need_value, need_addend = ctx.needs_input_grad
    grad_input = grad_weight = grad_bias = grad_value = None
    if need_value:
        grad_value = (s.reshape(*value.shape[:-1], 1) * g).to(value.dtype)
    if need_input or need_weight or need_bias:
        grad_z = (g * v).sum(-1, keepdim=True).reshape(z.shape) * s * (1 - s)
        if need_input:
            grad_input = (grad_z * w).to(input.dtype)
        if need_weight:
            grad_weight = (grad_z.reshape(1, -1) @ x.reshape(-1, x.shape[-1])).to(weight.dtype)
        if need_bias:
            grad_bias = grad_z.sum().reshape(bias.shape).to(bias.dtype)
    grad_addend = grad.to(ctx.addend_dtype) if need_addend else None
    return grad_input, grad_weight, grad_bias, grad_value, grad_addend


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
    computed in float32 (float64 if any argument is) and rounded once. Differentiable, also in
    forward mode and under the transforms of torch.func.

    Raises ValueError on a wrong shape or device, TypeError on a wrong dtype or no tensor.
    """
    _check_tensors(input, weight, bias, value, addend)
    if value.shape[:-1] != input.shape[:-1]:
        raise ValueError(
            f"gatefuse: value has shape {_shape(value)}; expected the leading dimensions of input "
            f"{_shape(input)}"
        )
    if _transformed():
        _check(input, weight, bias, value, addend)
        return _aten(input, weight, bias, value, addend)[0]
    return torch.ops.gatefuse.linear_sigmoid_mul.default(input, weight, bias, value, addend)


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
    _check_tensors(input, weight, bias, value, addend)
    _check(input, weight, bias, value, addend)
    return _compute(input, weight, bias, value, addend, torch.float64)[0]
