"""A hand-written gate, compiled with gatefuse in each way there is.

Run: python examples/handwritten_gate.py
Exits non-zero if the gate was not fused or the result differs from the float64 reference by more
than twice what eager PyTorch's does.
"""

import sys

import torch
from torch import Tensor, nn

import gatefuse


class GatedBlock(nn.Module):
    """A norm, an MLP and one sigmoid gate per token, as a shared expert has it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.up = nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)
        self.gate = nn.Linear(width, 1)

    def forward(self, residual: Tensor) -> Tensor:
        x = self.norm(residual)
        y = self.down(nn.functional.silu(self.up(x)))
        return residual + torch.sigmoid(self.gate(x)) * y


@torch.no_grad()
def main() -> int:
    """Compile, compare, and print what was fused; returns the exit code."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    block = GatedBlock(256).to(device, torch.bfloat16)
    x = torch.randn(8, 256, device=device, dtype=torch.bfloat16)

    eager = block(x)
    reference = GatedBlock(256).to(device, torch.float64)
    reference.load_state_dict(block.state_dict())
    exact = reference(x.double())
    # The rule for a result of lower precision: at most twice as far off as eager is, plus one unit.
    eps = torch.finfo(x.dtype).eps * exact.abs().max()
    bound = 2 * (eager - exact).abs().max() + eps

    failed = False
    for way in ("backend", "options", "fusing"):
        torch.compiler.reset()
        if way == "backend":
            with gatefuse.record() as report:
                out = torch.compile(block, backend="gatefuse")(x)
        elif way == "options":
            with gatefuse.record() as report:
                out = torch.compile(block, options=gatefuse.options())(x)
        else:
            with gatefuse.fusing() as report:
                out = torch.compile(block)(x)
        error = (out - exact).abs().max()
        ok = report.fused == 1 and bool(error <= bound)
        failed |= not ok
        print(f"--- {way}: {'ok' if ok else 'FAILED'}, error {error:.2e} (bound {bound:.2e})")
        print(report)

    # The op by itself, without torch.compile.
    out = gatefuse.linear_sigmoid_mul(x, block.gate.weight, x, bias=block.gate.bias, addend=x)
    print("--- the op, eager:", tuple(out.shape), out.dtype)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
