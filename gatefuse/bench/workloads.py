"""What is measured: the gate alone, with the routed add, and inside a decoder layer's glue.

Every workload is a module from ``inputs`` tensors ``[N, H]`` of one dtype to a tuple.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gatefuse
from gatefuse.bench.cases import NO_GATE, TRAINING

EXPERTS = 64  # rows of the router


class RMSNorm(nn.Module):
    """``weight * rmsnorm(x)`` as decoder layers write it: statistics in float32 (or wider)."""

    def __init__(self, H: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(H) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class Gate(nn.Module):
    """``sigmoid(x @ w.T) * v``, with ``add`` plus the routed experts' output."""

    kernels = 1  # the least number of launches anything could do it in
    trained = 2  # inputs with a gradient; that of the routed add is the result's

    def __init__(self, H: int, add: bool = False) -> None:
        super().__init__()
        self.inputs = 3 if add else 2
        self.gate = nn.Linear(H, 1, bias=False)

    def forward(self, x: Tensor, v: Tensor, *routed: Tensor) -> tuple[Tensor, ...]:
        out = F.sigmoid(self.gate(x)) * v
        return (routed[0] + out if routed else out,)

    def roofline(self, x: Tensor, v: Tensor, *routed: Tensor) -> tuple[Tensor, ...]:
        """An elementwise PyTorch op that moves the same bytes."""
        return (torch.addcmul(routed[0], x, v) if routed else torch.add(x, v),)

    def op(self, x: Tensor, v: Tensor, *routed: Tensor) -> tuple[Tensor, ...]:
        """The same through :func:`gatefuse.linear_sigmoid_mul`."""
        addend = routed[0] if routed else None
        return (gatefuse.linear_sigmoid_mul(x, self.gate.weight, v, addend=addend),)


class Glue(nn.Module):
    """The glue of a decoder layer: norm, router, gate, routed add, residual, next norm.

    gated: False leaves out the gate and nothing else.
    """

    inputs = 3
    kernels = 3  # norm, router, add and norm
    trained = 3

    def __init__(self, H: int, gated: bool = True) -> None:
        super().__init__()
        self.gated = gated
        self.norm_in = RMSNorm(H)
        self.router = nn.Linear(H, EXPERTS, bias=False)
        self.norm_out = RMSNorm(H)
        if gated:
            self.gate = nn.Linear(H, 1, bias=False)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        res, routed, v = inputs
        x = self.norm_in(res)
        logits = self.router(x)
        if self.gated:
            v = F.sigmoid(self.gate(x)) * v
        res = res + (routed + v)
        return logits, res, self.norm_out(res)


class Training(nn.Module):
    """A workload with its backward. Inputs: the workload's, and a gradient of each of its outputs;
    outputs: the workload's, and the gradients of inputs and weights."""

    def __init__(self, make: Callable[[int], Any], H: int) -> None:
        super().__init__()
        self.workload = make(H)
        self.kernels = 2 * self.workload.kernels
        self.inputs = self.workload.inputs

    def step(self, function: Callable[..., Any], *inputs: Tensor) -> tuple[Tensor, ...]:
        """Forward by ``function`` and backward."""
        number, trained = self.workload.inputs, self.workload.trained
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in inputs[:trained]]
            outputs = function(self.workload, *leaves, *inputs[trained:number])
            wanted = [*leaves, *self.workload.parameters()]
            gradients = torch.autograd.grad(outputs, wanted, inputs[number:])
        return tuple(t.detach() for t in (*outputs, *gradients))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self.step(call, *inputs)

    def roofline(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """A sum of two tensors, which moves three."""
        return (torch.add(*inputs[:2]),)

    def op(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The same through :func:`gatefuse.linear_sigmoid_mul`."""
        return self.step(lambda module, *tensors: module.op(*tensors), *inputs)


def call(module: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
    """What is compiled: one code object for all modules, so that weights can be rotated."""
    return module(*inputs)


WORKLOADS: dict[str, Callable[[int], Any]] = {
    "mul": Gate,
    "add": functools.partial(Gate, add=True),
    "glue": Glue,
    "glue" + NO_GATE: functools.partial(Glue, gated=False),
}
WORKLOADS |= {
    name + TRAINING: functools.partial(Training, make)
    for name, make in WORKLOADS.items()
    if not name.endswith(NO_GATE)
}
"""By name. The laboratory adds its own."""

InputSet = tuple[Any, tuple[Tensor, ...]]


def make_set(name: str, H: int, N: int, dtype: torch.dtype, device: str) -> InputSet:
    """A module with random weights and its random inputs."""
    with torch.device(device):
        module = WORKLOADS[name](H).to(dtype)
        inputs = tuple(torch.randn(N, H, dtype=dtype) for _ in range(module.inputs))
        if isinstance(module, Training):
            with torch.no_grad():
                inputs += tuple(torch.randn_like(y) for y in module.workload(*inputs))
        return module, inputs


def bytes_of(name: str, H: int, N: int, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of inputs and weights, and of these and the outputs: the least traffic."""
    with torch.no_grad():
        module, inputs = make_set(name, H, N, dtype, "meta")
        read = [*inputs, *module.parameters()]
        return sum(t.nbytes for t in read), sum(t.nbytes for t in [*read, *module(*inputs)])
