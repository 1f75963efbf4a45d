"""Launches the kernel once in each of its shapes, on this machine's GPU; for compute-sanitizer:

compute-sanitizer --tool memcheck --error-exitcode 9 python -m tests.launch_shapes

Rows are at odd distances; each shape runs with all operands and without the optional ones, and its
result is compared with float64. Prints the number of launches.
"""

from __future__ import annotations

import torch

from gatefuse import kernels
from gatefuse.ops import linear_sigmoid_mul_reference
from tests.test_devices import TARGETS, Launch, every_launch

ROWS = 3


def rows_of(width: int, dtype: torch.dtype) -> torch.Tensor:
    """Random rows at an odd distance, between elements that nothing may touch."""
    return torch.randn(ROWS, width + 3, device="cuda").to(dtype)[:, :width]


def run(shape: Launch, optional: bool) -> None:
    x, v = rows_of(shape.H, shape.dtype), rows_of(shape.D, shape.dtype)
    w = torch.randn(1, shape.H, device="cuda").to(shape.dtype) * shape.H**-0.5
    b = torch.randn(1, device="cuda").to(shape.dtype) if optional else None
    a = rows_of(shape.D, shape.dtype) if optional else None
    logit = torch.empty(ROWS, device="cuda", dtype=shape.dtype) if optional else None
    out = torch.full_like(rows_of(shape.D, shape.dtype), torch.nan)
    kernels.launch(x, w, v, b, a, out, logit, pdl=shape.pdl, config=shape.config)
    want = linear_sigmoid_mul_reference(x, w, v, b, a)
    error = (out.double() - want).abs().max() / want.abs().max()
    assert error <= 2 * torch.finfo(shape.dtype).eps + 1e-5, (shape, float(error))


def main() -> None:
    major, minor = torch.cuda.get_device_capability()
    name = "sm_90" if (major, minor) >= (9, 0) else "sm_80"
    shapes = every_launch(TARGETS[name])
    for shape in shapes:
        for optional in (True, False):
            run(shape, optional)
    torch.cuda.synchronize()
    print(f"{2 * len(shapes)} launches in {len(shapes)} shapes")


if __name__ == "__main__":
    main()
