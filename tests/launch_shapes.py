"""Launches the kernels once in each of their shapes, on this machine's GPU; for compute-sanitizer:

compute-sanitizer --tool memcheck --error-exitcode 9 python -m tests.launch_shapes

Rows are at odd distances; each shape runs with all operands and without the optional ones, and its
result is compared with float64. Prints the number of launches of the forward and of the backward.
"""

from __future__ import annotations

import itertools

import torch

from gatefuse import kernels
from gatefuse.ops import linear_sigmoid_mul_reference
from tests.test_devices import TARGETS, Launch, every_launch
from tests.test_gradients import ALL, check_kernel, within

ROWS = 3

#: Widths of input and value that the backward's launch rule tells apart, full and partial blocks.
BACKWARD_WIDTHS = [(64, 64), (1024, 1024), (2048, 2048), (2500, 100), (4096, 4096), (8192, 8192)]
#: Which gradients are wanted, and whether there is a bias.
BACKWARD_WANTED = [
    (ALL, True),
    (ALL, False),
    ((True, False, True, False), False),
    ((False, True, False, True), True),
    ((False, False, True, False), True),
]
#: Rows and multiprocessors: programs with one step and with several, whose sums are in one block
#: and in several.
BACKWARD_ROWS = [(7, 8), (19, 2), (300, 132)]


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


def run_backward() -> int:
    """Each shape twice, for equal bits; returns the number of calls."""
    calls = 0
    for (h, d), dtype, (needed, bias), (rows, multiprocessors) in itertools.product(
        BACKWARD_WIDTHS, ("bfloat16", "float32"), BACKWARD_WANTED, BACKWARD_ROWS
    ):
        case = rows, h, d, dtype, 3, bias, needed
        assert within(check_kernel("cuda", *case, multiprocessors=multiprocessors)), case
        calls += 2
    return calls


def main() -> None:
    torch.manual_seed(0)
    major, minor = torch.cuda.get_device_capability()
    name = "sm_90" if (major, minor) >= (9, 0) else "sm_80"
    shapes = every_launch(TARGETS[name])
    for shape in shapes:
        for optional in (True, False):
            run(shape, optional)
    backward = run_backward()
    torch.cuda.synchronize()
    print(f"{2 * len(shapes)} launches in {len(shapes)} shapes; {backward} of the backward")


if __name__ == "__main__":
    main()
