"""What is measured: the gate alone, with the routed add, and inside a decoder layer's glue.

Every chain is a module over inputs ``[N, H]`` of one dtype, run under ``torch.no_grad()``.
``byte_count`` is the least traffic: each input and weight read once, each output written once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.grid import NO_GATE, VARIANTS

EXPERTS = 64  # rows of the router
SHARED = 512  # inner width of the shared expert, where it is part of the chain


class RMSNorm(nn.Module):
    """``weight * rmsnorm(x)`` as decoder layers write it: statistics in float32 (or wider)."""

    def __init__(self, H: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(H) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class Chain(nn.Module):
    """A measured module; :meth:`forward` takes ``inputs`` tensors ``[N, H]``, returns a tuple.

    ``kernels`` is the least number of launches anything could do it in.
    """

    inputs: int
    kernels: int = 1

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

    def limit(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """An elementwise PyTorch op that moves the same bytes."""
        raise NotImplementedError

    def op(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The chain through :func:`gatefuse.linear_sigmoid_mul`."""
        raise NotImplementedError


class Mul(Chain):
    """``sigmoid(x @ w.T) * v``"""

    inputs = 2

    def __init__(self, H: int) -> None:
        super().__init__(H)
        self.gate = nn.Linear(H, 1, bias=False)

    def forward(self, x: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return (F.sigmoid(self.gate(x)) * v,)

    def limit(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        x, v = inputs
        return (torch.add(x, v),)

    def op(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        import gatefuse

        x, v = inputs
        return (gatefuse.linear_sigmoid_mul(x, self.gate.weight, v),)


class Add(Chain):
    """``routed + sigmoid(x @ w.T) * v``"""

    inputs = 3

    def __init__(self, H: int) -> None:
        super().__init__(H)
        self.gate = nn.Linear(H, 1, bias=False)

    def forward(self, routed: Tensor, x: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return (routed + F.sigmoid(self.gate(x)) * v,)

    def limit(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        routed, x, v = inputs
        return (torch.addcmul(routed, x, v),)

    def op(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        import gatefuse

        routed, x, v = inputs
        return (gatefuse.linear_sigmoid_mul(x, self.gate.weight, v, addend=routed),)


@torch.library.custom_op("gatefuse_bench::opaque", mutates_args=())
def opaque(x: Tensor) -> Tensor:
    """Something that Inductor cannot look into, such as a collective: a copy."""
    return x.clone()


@opaque.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Glue(Chain):
    """The glue of a decoder layer: norm, router, gate, routed add, residual, next norm.

    gated: False leaves out the gate and nothing else. variant: one of

    - ``""``: all of it, on ``[N, H]``.
    - ``"alone"``: no residual and no next norm; the sum is an output.
    - ``"add-then-reshape"``, ``"reshape-then-add"``: the hidden states are ``[1, N, H]``, the
      experts work on ``[N, H]``, and the routed add is done before or after the way back.
    - ``"matmuls"``: the value is made from x by two matrix products and a SiLU, the shared expert.
    - ``"opaque"``: an opaque call, such as an all-reduce, after the routed add.
    """

    def __init__(self, H: int, gated: bool = True, variant: str = "") -> None:
        super().__init__(H)
        self.gated = gated
        self.variant = variant
        self.inputs = 2 if variant == "matmuls" else 3
        # norm, router, add and norm
        self.kernels = {"alone": 2, "matmuls": 5, "opaque": 5}.get(variant, 3)
        self.norm_in = RMSNorm(H)
        self.router = nn.Linear(H, EXPERTS, bias=False)
        if variant != "alone":
            self.norm_out = RMSNorm(H)
        if variant == "matmuls":
            self.up = nn.Linear(H, SHARED, bias=False)
            self.down = nn.Linear(SHARED, H, bias=False)
        if gated:
            self.gate = nn.Linear(H, 1, bias=False)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        res, routed = inputs[:2]
        reshaped = self.variant in ("add-then-reshape", "reshape-then-add")
        if reshaped:
            res = res.unsqueeze(0)
        hidden = self.norm_in(res)
        x = hidden.view(-1, self.H) if reshaped else hidden
        logits = self.router(x)
        v = self.down(F.silu(self.up(x))) if self.variant == "matmuls" else inputs[2]
        if self.gated:
            v = F.sigmoid(self.gate(x)) * v
        if self.variant == "reshape-then-add":
            out = routed.view(hidden.shape) + v.view(hidden.shape)
        else:
            out = routed + v
        if self.variant == "add-then-reshape":
            out = out.view(hidden.shape)
        if self.variant == "opaque":
            out = opaque(out)
        if self.variant == "alone":
            return logits, out
        res = res + out
        return logits, res, self.norm_out(res)

    def output_width(self) -> int:
        return EXPERTS + (self.H if self.variant == "alone" else 2 * self.H)


CHAINS: dict[str, Callable[[int], Chain]] = {"mul": Mul, "add": Add}
for _name in ("glue", *VARIANTS):
    _variant = _name.removeprefix("glue").removeprefix("-")
    CHAINS[_name] = functools.partial(Glue, variant=_variant)
    CHAINS[_name + NO_GATE] = functools.partial(Glue, variant=_variant, gated=False)

InputSet = tuple[Chain, tuple[Tensor, ...]]


def make_set(name: str, H: int, N: int, dtype: torch.dtype, device: str) -> InputSet:
    """A module with random weights and its random inputs."""
    with torch.device(device):
        module = CHAINS[name](H).to(dtype)
        return module, tuple(torch.randn(N, H, dtype=dtype) for _ in range(module.inputs))


def call(module: Chain, *inputs: Tensor) -> tuple[Tensor, ...]:
    """What is compiled: one code object for all modules, so that weights can be rotated."""
    result: tuple[Tensor, ...] = module(*inputs)
    return result
