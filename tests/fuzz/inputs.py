"""Tensors of a fuzzed program: the same values on every device and in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LAYOUTS", "Make"]

LAYOUTS = ("contiguous", "transposed", "every other", "offset", "expanded", "padded rows")


@dataclass(frozen=True)
class Make:
    """Makes the inputs of a program. wide: in float64, with the values that the dtype can express.

    Values depend on ``key`` and on the shape alone; they are drawn on the CPU.
    """

    device: str = "cpu"
    wide: bool = False

    def __call__(
        self,
        key: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        layout: str = "contiguous",
        scale: float = 1.0,
        special: bool = False,
        grad: bool = False,
    ) -> Tensor:
        """special: with a NaN and infinities at random places."""
        generator = torch.Generator().manual_seed(key)

        def normal(*size: int) -> Tensor:
            t = torch.randn(size, generator=generator) * scale
            if special and t.numel():
                for value in (float("nan"), float("inf"), float("-inf")):
                    place = int(torch.randint(2 * t.numel(), (), generator=generator))
                    if place < t.numel():
                        t.view(-1)[place] = value
            t = t.to(self.device, dtype)
            return t.double() if self.wide else t

        t = _lay_out(normal, shape, layout)
        return t.detach().requires_grad_(grad)

    def mask(self, key: int, rows: int) -> Tensor:
        """Booleans, about half of them true."""
        generator = torch.Generator().manual_seed(key)
        return (torch.rand(rows, generator=generator) < 0.5).to(self.device)

    def indices(self, key: int, rows: int) -> Tensor:
        """A permutation."""
        generator = torch.Generator().manual_seed(key)
        return torch.randperm(rows, generator=generator).to(self.device)


def _lay_out(normal: object, shape: tuple[int, ...], layout: str) -> Tensor:
    assert callable(normal)
    if not shape:
        return normal()
    *lead, last = shape
    match layout:
        case "transposed":
            return normal(*reversed(shape)).permute(*reversed(range(len(shape))))
        case "every other":
            return normal(*lead, 2 * last)[..., ::2]
        case "offset":
            return normal(*lead, last + 3)[..., 3:]
        case "padded rows":
            return normal(*lead, last + 1)[..., :last]
        case "expanded":
            return normal(*[1] * len(lead), last).expand(shape)
    return normal(*shape)
