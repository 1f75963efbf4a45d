"""Rewrites that Inductor makes on CUDA alone, made on the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch._inductor.config as inductor_config
from torch import Tensor
from torch._decomp.decompositions import pw_cast_for_opmath
from torch._inductor import decomposition
from torch._inductor.fx_passes import pad_mm, post_grad
from torch.fx.experimental.symbolic_shapes import statically_known_true


@pw_cast_for_opmath
def _cuda_mm(self: Tensor, input2: Tensor, out_dtype: torch.dtype | None = None) -> Any:
    if statically_known_true(self.shape[0] == 1) or statically_known_true(input2.shape[1] == 1):
        return (self.unsqueeze(2) * input2.unsqueeze(0)).sum(dim=1)
    return NotImplemented


@pw_cast_for_opmath
def _cuda_bmm(self: Tensor, batch2: Tensor, out_dtype: torch.dtype | None = None) -> Any:
    if statically_known_true(self.shape[1] == 1) or statically_known_true(batch2.shape[2] == 1):
        return (self.unsqueeze(-1) * batch2.unsqueeze(1)).sum(dim=2)
    return NotImplemented


@contextlib.contextmanager
def emulate_coordinate_descent() -> Iterator[None]:
    """Inductor decomposes matrix-vector products as it does on CUDA under coordinate descent.

    Swaps the `mm` and `bmm` decompositions of torch/_inductor/decomposition.py, whose branch for
    `coordinate_descent_tuning` excludes the CPU, for that branch; `addmm` has no such branch there,
    and its CPU branch is switched off.
    """

    def keep(*args: Any, **kwargs: Any) -> Any:
        return NotImplemented

    swapped = {
        torch.ops.aten.mm.default: _cuda_mm,
        torch.ops.aten.bmm.default: _cuda_bmm,
        torch.ops.aten.addmm.default: keep,
    }
    table = decomposition.decompositions
    original = {op: table[op] for op in swapped}
    table.update(swapped)
    decomposition.fast_random_decomps.cache_clear()
    try:
        yield
    finally:
        table.update(original)
        decomposition.fast_random_decomps.cache_clear()


@contextlib.contextmanager
def pad_products() -> Iterator[None]:
    """Inductor pads every product whose sizes are no multiples of 8, as it does on CUDA where it
    measures that to be faster, and takes biases out of products."""
    cuda = dict.fromkeys(("check_device", "check_dtype", "has_triton"), lambda *_: True)
    with (
        mock.patch.multiple(pad_mm, **cuda),
        mock.patch.object(post_grad, "is_gpu", return_value=True),
        inductor_config.patch(shape_padding=True, force_shape_pad=True),
    ):
        yield
