"""Fake tensors: a model without its weights, on a device that this machine may not have."""

from __future__ import annotations

import contextlib
import copy
import types
from collections.abc import Callable, Iterator
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

__all__ = ["available", "fake_tensors", "has_no_data", "on_fakes"]

aten = torch.ops.aten

_H200 = types.SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    total_memory=141 << 30,
    L2_cache_size=50 << 20,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10,
    gcnArchName="",
)
"""The GPU that PyTorch believes in where there is none."""


def available(device_type: str) -> bool:
    """Whether this machine has such a device."""
    if device_type == "cpu":
        return True
    module = getattr(torch, device_type, None)
    return module is not None and bool(getattr(module, "is_available", lambda: False)())


def has_no_data(tensor: Any) -> bool:
    """Whether it is a tensor on the meta device, or a fake one: nothing can be computed with it."""
    return isinstance(tensor, Tensor) and (tensor.is_meta or isinstance(tensor, FakeTensor))


@contextlib.contextmanager
def fake_tensors(device: torch.device) -> Iterator[FakeTensorMode]:
    """Tensors made inside are fake, and may be on ``device``.

    A CUDA device need not exist: PyTorch then believes in one H200, in all threads, for the time of
    the block.
    """
    with contextlib.ExitStack() as stack:
        if device.type == "cuda" and not available("cuda"):
            stack.enter_context(_imagined_gpu())
        yield stack.enter_context(_FakeMode(allow_non_fake_inputs=True))


class _FakeMode(FakeTensorMode):
    """Guesses what depends on data, so that code between compiled graphs runs on: a number is 1,
    a condition is true, two elements are found. Dynamo traces with a mode of its own, which does
    not guess."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
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

    What is fake in this mode and on the device already is taken as it is. Raises what
    ``copy.deepcopy`` raises on what it cannot copy.
    """
    memo: dict[int, Any] = {}

    def fake(t: Tensor) -> Tensor:
        if is_traceable_wrapper_subclass(t) or t.layout is not torch.strided:
            return mode.from_tensor(t).to(device)
        new = torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device=device)
        new.requires_grad_(t.requires_grad)
        return new

    tensors = []
    if isinstance(value, nn.Module):
        tensors = [*value.parameters(), *value.buffers()]
        if all(isinstance(t, FakeTensor) and t.device == device for t in tensors) and tensors:
            return value
    with mode, _CopyOnce(fake):
        for t in tensors:
            new = fake(t)
            if isinstance(t, nn.Parameter):
                new = nn.Parameter(new, t.requires_grad)
            new.__dict__.update(t.__dict__)
            memo[id(t)] = new
        return copy.deepcopy(value, memo)


class _CopyOnce(TorchFunctionMode):
    """``copy.deepcopy`` of a tensor makes a fake one."""

    def __init__(self, fake: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._fake = fake

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        if id(tensor) not in memo:
            memo[id(tensor)] = new = self._fake(tensor)
            new.__dict__.update(tensor.__dict__)  # which sizes are marked dynamic
        return memo[id(tensor)]


@contextlib.contextmanager
def _imagined_gpu() -> Iterator[None]:
    import torch._inductor.fx_passes.joint_graph as joint_graph
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.runtime.hints import DeviceProperties
    from torch._subclasses import fake_tensor

    hints = {n: v for n, v in vars(_H200).items() if n in DeviceProperties._fields}
    state = torch.zeros(16, dtype=torch.uint8)
    cuda: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda *_: _H200,
        "get_device_capability": lambda *_: (_H200.major, _H200.minor),
        "get_device_name": lambda *_: _H200.name,
        "is_bf16_supported": lambda *_, **__: True,
        "is_current_stream_capturing": lambda: False,
        "get_rng_state": lambda *_: state,
        "set_rng_state": lambda *_: None,
        "_lazy_init": lambda: None,
        "_exchange_device": lambda *_: 0,
        "_maybe_exchange_device": lambda *_: 0,
    }
    properties = DeviceProperties(type="cuda", index=0, cc=90, **hints)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_replaced(torch.cuda, **cuda))
        stack.enter_context(
            _replaced(
                CudaInterface,
                is_available=staticmethod(lambda: True),
                raise_if_triton_unavailable=staticmethod(lambda *_: None),
            )
        )
        stack.enter_context(_replaced(torch.accelerator, is_available=lambda: False))
        nothing = lambda *_, **__: contextlib.nullcontext()  # noqa: E731
        stack.enter_context(_replaced(torch.random, fork_rng=nothing))
        stack.enter_context(
            _replaced(DeviceProperties, create=classmethod(lambda *_: properties))
        )
        if hasattr(fake_tensor, "init_gpu_context"):
            stack.enter_context(_replaced(fake_tensor, init_gpu_context=lambda *_: None))
        # Its attention patterns are traced with tensors on the device.
        stack.enter_context(_replaced(joint_graph, lazy_init=lambda *_: None))
        _forget_triton()
        stack.callback(_forget_triton)
        yield


@contextlib.contextmanager
def _replaced(target: Any, **values: Any) -> Iterator[None]:
    """Other values of a module's or a class's names inside the block."""
    before = {name: target.__dict__[name] for name in values if name in target.__dict__}
    for name, value in values.items():
        setattr(target, name, value)
    try:
        yield
    finally:
        for name in values:
            if name in before:
                setattr(target, name, before[name])
            else:
                delattr(target, name)


def _forget_triton() -> None:
    # What PyTorch has found out about Triton is of the real devices, or of the imagined one.
    import torch.utils._triton

    for function in vars(torch.utils._triton).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()
