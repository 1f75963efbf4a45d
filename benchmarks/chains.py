"""What is measured: the gate alone, with the routed add, and inside a decoder layer's glue.

Every chain is a module over inputs ``[N, H]`` of one dtype, run under ``torch.no_grad()``.
``byte_count`` is the least traffic: each input and weight read once, each output written once.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

EXPERTS = 64  # rows of the router


class RMSNorm(nn.Module):
    """``weight * rmsnorm(x)`` as decoder layers write it: statistics in float32 (or wider)."""

    def __init__(self, H: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(H) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class Chain(nn.Module):
    """A measured module; :meth:`forward` takes ``inputs`` tensors ``[N, H]``, returns a tuple.

    ``kernels`` is the least number of launches anything could do it in.
    """

    inputs: ClassVar[int]
    kernels: ClassVar[int] = 1

    def __init__(self, H: int) -> None:
        super().__init__()
        self.H = H

    def input_bytes(self, N: int) -> int:
        """Bytes of the inputs and weights."""
        weights = list(self.parameters())
        elements = self.inputs * N * self.H + sum(p.numel() for p in weights)
        return elements * weights[0].element_size()

    def byte_count(self, N: int) -> int:
        """Bytes of the inputs, weights and outputs."""
        itemsize = next(self.parameters()).element_size()
        return self.input_bytes(N) + N * self.output_width() * itemsize

    def output_width(self) -> int:
        """Elements per row of all outputs together."""
        return self.H

    def limit(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
        """An elementwise PyTorch op that moves the same bytes, or None."""
        return None

    def op(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
        """The chain through :func:`gatefuse.linear_sigmoid_mul`, or None."""
        return None


class Mul(Chain):
    """``sigmoid(x @ w.T) * v``"""

    inputs = 2

    def __init__(self, H: int) -> None:
        super().__init__(H)
        self.gate = nn.Linear(H, 1, bias=False)

    def forward(self, x: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (F.sigmoid(self.gate(x)) * v,)

    def limit(self, x: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.add(x, v),)

    def op(self, x: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        import gatefuse

        return (gatefuse.linear_sigmoid_mul(x, self.gate.weight, v),)


class Add(Chain):
    """``routed + sigmoid(x @ w.T) * v``"""

    inputs = 3

    def __init__(self, H: int) -> None:
        super().__init__(H)
        self.gate = nn.Linear(H, 1, bias=False)

    def forward(
        self, routed: torch.Tensor, x: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        return (routed + F.sigmoid(self.gate(x)) * v,)

    def limit(
        self, routed: torch.Tensor, x: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        return (torch.addcmul(routed, x, v),)

    def op(
        self, routed: torch.Tensor, x: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        import gatefuse

        return (gatefuse.linear_sigmoid_mul(x, self.gate.weight, v, addend=routed),)


class GlueNoGate(Chain):
    """The glue of a decoder layer without the gate: norm, router, routed add, residual, norm."""

    inputs = 3
    kernels = 3  # norm, router matmul, add and norm

    def __init__(self, H: int) -> None:
        super().__init__(H)
        self.norm_in = RMSNorm(H)
        self.router = nn.Linear(H, EXPERTS, bias=False)
        self.norm_out = RMSNorm(H)

    def shared(self, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return v

    def forward(
        self, res: torch.Tensor, routed: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        x = self.norm_in(res)
        logits = self.router(x)
        res = res + (routed + self.shared(x, v))
        return logits, res, self.norm_out(res)

    def output_width(self) -> int:
        return EXPERTS + 2 * self.H


class Glue(GlueNoGate):
    """The same with the gate on ``v``."""

    def __init__(self, H: int) -> None:
        super().__init__(H)
        self.gate = nn.Linear(H, 1, bias=False)

    def shared(self, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.sigmoid(self.gate(x)) * v


CHAINS: dict[str, type[Chain]] = {
    "mul": Mul,
    "add": Add,
    "glue": Glue,
    "glue_nogate": GlueNoGate,
}

InputSet = tuple[Chain, tuple[torch.Tensor, ...]]


def make_set(name: str, H: int, N: int, dtype: torch.dtype, device: str) -> InputSet:
    """A module with random weights and its random inputs."""
    with torch.device(device):
        module = CHAINS[name](H).to(dtype)
        return module, tuple(torch.randn(N, H, dtype=dtype) for _ in range(module.inputs))


def call(module: Chain, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What is compiled: one code object for all modules, so that weights can be rotated."""
    return module(*inputs)
