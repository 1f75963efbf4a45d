"""Fake tensors: a model without its weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = ["FakeMode", "available", "has_no_data", "on_fakes"]

aten = torch.ops.aten


def available(device_type: str) -> bool:
    """Whether this machine has such a device."""
    if device_type == "cpu":
        return True
    module = getattr(torch, device_type, None)
    return module is not None and bool(getattr(module, "is_available", lambda: False)())


def has_no_data(tensor: Any) -> bool:
    """Whether it is a tensor on the meta device, or a fake one: nothing can be computed with it."""
    return isinstance(tensor, Tensor) and (tensor.is_meta or isinstance(tensor, FakeTensor))


class FakeMode(FakeTensorMode):
    """Guesses what depends on data, for the code between compiled graphs: a number is 1, a
    condition is true, two elements are found. Dynamo traces with a mode of its own, which does not
    guess."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return super().__torch_dispatch__(func, types, args, kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            t = args[0]
            if func is aten._local_scalar_dense.default:
                return True if t.dtype is torch.bool else 1.0 if t.is_floating_point() else 1
            if func is aten.nonzero.default:
                return t.new_empty((min(2, t.numel()), t.dim()), dtype=torch.int64)
            if func is aten.masked_select.default:
                return t.new_empty((min(2, t.numel()),))
            if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
                return func(t, _without_masks(args[1]), *args[2:], **(kwargs or {}))
            raise


def _without_masks(indices: Any) -> list[Any]:
    """Indices of two elements in place of each mask."""
    result: list[Any] = []
    for index in indices:
        if index is not None and index.dtype in (torch.bool, torch.uint8):
            found = [index.new_empty((min(2, index.numel()),), dtype=torch.int64)]
            result += found * index.dim()
        else:
            result.append(index)
    return result


def on_fakes(value: Any, mode: FakeTensorMode, device: torch.device) -> Any:
    """A copy of a model, or of arguments, with fake tensors on ``device``; no data is copied.

    Raises what ``copy.deepcopy`` raises on what it cannot copy.
    """
    memo: dict[int, Any] = {}

    def fake(t: Tensor) -> Tensor:
        wrapper: Any = is_traceable_wrapper_subclass
        if wrapper(t) or t.layout is not torch.strided:
            return mode.from_tensor(t).to(device)
        new = torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device=device)
        new.requires_grad_(t.requires_grad)
        return new

    tensors = []
    if isinstance(value, nn.Module):
        tensors = [*value.parameters(), *value.buffers()]
    with mode, _CopyOnce(fake):
        for t in tensors:
            new = fake(t)
            if isinstance(t, nn.Parameter):
                new = nn.Parameter(new, t.requires_grad)
            memo[id(t)] = _with_marks(new, t)
        return copy.deepcopy(value, memo)


def _with_marks(new: Tensor, old: Tensor) -> Tensor:
    """``new`` with the attributes of ``old``, such as which sizes are marked dynamic."""
    new.__dict__.update({k: v for k, v in old.__dict__.items() if k not in new.__dict__})
    return new


class _CopyOnce(TorchFunctionMode):
    """``copy.deepcopy`` of a tensor makes a fake one."""

    def __init__(self, fake: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._fake = fake

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        if id(tensor) not in memo:
            memo[id(tensor)] = _with_marks(self._fake(tensor), tensor)
        return memo[id(tensor)]
