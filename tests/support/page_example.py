"""A small decoder like Qwen2-MoE's, with everything that a page can show."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gatefuse


class SparseMoeBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.experts = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, width, bias=False)
        self.down = nn.Linear(width, width, bias=False)
        self.shared_expert_gate = nn.Linear(width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        routed = F.relu(self.experts(x))
        shared = self.down(F.silu(self.up(x)))
        return routed + F.sigmoid(self.shared_expert_gate(x)) * shared


class HeadGate(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (2, -1))
        gate = torch.sigmoid(self.gate(x)).unsqueeze(-1)
        return (heads * gate).flatten(-2)  # <script>alert("per head")</script>


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.mlp = SparseMoeBlock(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class Model(nn.Module):
    """Gates that fuse, one per head that does not, and a router."""

    def __init__(self, width: int = 64, layers: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.head_gate = HeadGate(width)
        self.router = nn.Linear(width, 4, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for layer in self.layers:
            x = layer(x)
        return self.head_gate(x), torch.sigmoid(self.router(x))


def report(**sizes: Any) -> gatefuse.Report:
    torch.manual_seed(0)
    model = Model(**sizes).to(torch.bfloat16)
    width = model.router.in_features
    with torch.no_grad():
        return gatefuse.explain(model, torch.randn(16, width, dtype=torch.bfloat16))
