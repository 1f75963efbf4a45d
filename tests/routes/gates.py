"""The model that the routes compile: a small shared expert with its gate."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.judge import judge

WIDTH, ROWS = 32, 6


class SharedExpert(nn.Module):
    """``routed + sigmoid(gate(x)) * down(silu(up(x)))``: one gate with an addend."""

    def __init__(self, hidden: int = 2 * WIDTH) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 1, bias=False)
        self.up = nn.Linear(WIDTH, hidden, bias=False)
        self.down = nn.Linear(hidden, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sigmoid(self.gate(x)) * self.down(F.silu(self.up(x)))


def make_expert(seed: int = 0) -> SharedExpert:
    torch.manual_seed(seed)
    return SharedExpert()


def make_input(*lead: int, seed: int = 1, grad: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*(lead or (ROWS,)), WIDTH, generator=generator).requires_grad_(grad)


def judge_all(fused: list[Tensor], eager: list[Tensor], reference: list[Tensor]) -> None:
    """Assert the suite's tolerance on each result; strides are left to the route."""
    assert len(fused) == len(eager) == len(reference) > 0
    for i, results in enumerate(zip(fused, eager, reference, strict=True)):
        judge(f"result {i}", *results, strides=False)


def train_step(run: nn.Module, x: Tensor) -> list[Tensor]:
    """Result of a model, then what its backward leaves in `.grad` of the input and parameters."""
    out = run(x)
    out.square().sum().backward()
    results = [out.detach()]
    for t in (x, *run.parameters()):
        assert t.grad is not None
        results.append(t.grad)
        t.grad = None
    return results
