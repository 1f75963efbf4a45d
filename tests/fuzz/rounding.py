"""How a program might have been rounded: each result moved by up to a unit in its last place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Perturbed"]

aten = torch.ops.aten

#: Operators that compute nothing: their results are exact.
_EXACT = {
    aten.clone, aten.cat, aten.index, aten.index_select, aten.flip, aten.roll, aten.repeat,
    aten.zeros_like, aten.ones_like, aten.full, aten.full_like, aten.arange, aten.new_zeros,
    aten.constant_pad_nd, aten.neg, aten.stack, aten.where, aten.scalar_tensor, aten.reshape,
    aten._unsafe_view, aten.slice_backward, aten.select_backward, aten.copy, aten.nonzero,
}  # fmt: skip


class Perturbed(TorchDispatchMode):
    """Moves every computed float result by -1, 0 or 1 times the epsilon of its dtype, at random.

    Roundings fall otherwise in code that computes the same in another order. Where a result is
    small against what it is the difference of, eager may be right by luck, and a bound made of its
    error alone is none.
    """

    supports_higher_order_operators = True

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = getattr(func, "overloadpacket", None)
        if packet is None or packet in _EXACT or torch.Tag.nondeterministic_seeded in func.tags:
            return result
        schema = func._schema
        if schema.is_mutable or any(r.alias_info is not None for r in schema.returns):
            return result
        if packet is aten._to_copy and result.dtype.itemsize >= args[0].dtype.itemsize:
            return result
        for t in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(t, Tensor) and t.is_floating_point() and t.dtype.itemsize > 1:
                self._move(t)
        return result

    def _move(self, t: Tensor) -> None:
        if any(stride == 0 for stride, size in zip(t.stride(), t.shape) if size > 1):
            return  # one element in several places cannot be written to
        self.count += 1
        generator = torch.Generator().manual_seed((self.seed << 20) + self.count)
        steps = torch.randint(-1, 2, t.shape, generator=generator).to(t.device)
        t.copy_(t.double() * (1 + steps * torch.finfo(t.dtype).eps))
