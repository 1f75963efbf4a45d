"""How the tests judge values: against float64, by the error that eager makes.

The one tolerance of the suite: with `ref` the float64 result,

    ||fused - ref||     <= 2 * ||eager - ref||     + eps(dtype) * ||ref||       (norm)
    max |fused - ref|   <= 2 * max |eager - ref|   + eps(dtype) * max |ref|     (worst element)

    eps(dtype) = ulp(dtype) + 4 * ulp(float32)

The first term is the rounding of the result: half an ulp may be lost, and eager, which sets the
bound, may have rounded luckily where fused did not. The second is float32 arithmetic on the way,
sums above all, which another order rounds otherwise. dtype is that of the result, or bfloat16 under
autocast, where a float32 result was rounded to bfloat16 on its way.
"""

from __future__ import annotations

import torch
from torch import Tensor


def judge(
    name: str,
    actual: Tensor,
    eager: Tensor,
    reference: Tensor,
    working_dtype: torch.dtype | None = None,
    strides: bool = True,
) -> None:
    """Assert the tolerance above, and that dtype, shape and strides are those of eager."""
    assert actual.dtype == eager.dtype, f"{name}: dtype {actual.dtype}, eager {eager.dtype}"
    assert actual.shape == eager.shape, f"{name}: shape {actual.shape}, eager {eager.shape}"
    assert not strides or actual.stride() == eager.stride(), f"{name}: strides {actual.stride()}"
    if actual.numel() == 0:
        return
    ref = reference.detach().double()
    error, allowed = actual.detach().double() - ref, eager.detach().double() - ref
    eps = torch.finfo(working_dtype or eager.dtype).eps + 4 * torch.finfo(torch.float32).eps
    for form, size in (("norm", torch.linalg.vector_norm), ("worst", lambda t: t.abs().max())):
        bound = 2 * size(allowed) + eps * size(ref)
        assert size(error) <= bound, (
            f"{name}: {form} error {size(error):.3e} > {bound:.3e} (eager {size(allowed):.3e})"
        )


def assert_identical(actual: list[Tensor], expected: list[Tensor]) -> None:
    """Bit for bit: values, signs of zero, NaN payloads, dtype, shape and strides."""
    assert len(actual) == len(expected)
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride()), f"output {i}"
        same = torch.equal(
            a.detach().contiguous().view(torch.uint8), b.detach().contiguous().view(torch.uint8)
        )
        assert same, f"output {i} differs by {(a.double() - b.double()).abs().max():.3e}"
