"""Triton kernel of the fused gate and the rules by which it is launched.

The kernel computes ``sigmoid(input @ weight.T + bias) * value + addend``, one row per program:
products and sums in float32, one rounding at the end. Bytes moved per row: ``H`` elements of
input, ``D`` of value, ``D`` of addend if there is one, ``D`` of out; the weight stays in L2.

Importing this module imports Triton, so import it only when a kernel is about to be launched.
"""

# mypy: disable-error-code="no-untyped-def, assignment, unreachable"
from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

__all__ = ["LaunchConfig", "launch", "launch_config", "linear_sigmoid_mul_kernel", "supports_pdl"]


class LaunchConfig(NamedTuple):
    """Block sizes, warps and memory hints of one launch.

    block_h, block_d: elements per load in the dot product and in the product with the value.
    trigger_first: with programmatic dependent launch, let the next grid start before this one's
    loads rather than after them. evict_first: rows, which are read once, leave L2 first.
    """

    block_h: int
    block_d: int
    num_warps: int
    trigger_first: bool = False
    evict_first: bool = False


@triton.jit
def _load_chunk(
    ptr,
    i,
    offsets,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    POLICY: tl.constexpr,
    PAD: tl.constexpr = None,
):
    """Chunk ``i`` of a row. Only a partial chunk is masked; beyond the row it reads PAD."""
    full: tl.constexpr = (i + 1) * BLOCK <= WIDTH
    return tl.load(
        ptr + i * BLOCK + offsets,
        mask=None if full else i * BLOCK + offsets < WIDTH,
        other=None if full else PAD,
        eviction_policy=POLICY,
    )


@triton.jit
def linear_sigmoid_mul_kernel(
    input_ptr,  # [N, H], inner stride 1
    weight_ptr,  # [1, H], contiguous
    bias_ptr,  # [1] or None
    value_ptr,  # [N, D], inner stride 1
    addend_ptr,  # [N, D], inner stride 1, or None
    out_ptr,  # [N, D], inner stride 1
    logit_ptr,  # [N] or None
    input_stride,  # row strides, in elements
    value_stride,
    addend_stride,
    out_stride,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr,  # load the whole row before reducing it (rows that fit in registers)
    PDL: tl.constexpr,  # programmatic dependent launch: may start before its inputs are written
    WEIGHT_FIRST: tl.constexpr,  # the weight is not written by the preceding kernel: load it early
    TRIGGER_FIRST: tl.constexpr,  # let the next grid start before this one's loads, not after them
    EVICT_FIRST: tl.constexpr,  # rows leave L2 before the result does
):
    """One row per program: dot product, sigmoid, product, sum; in float32, rounded once."""
    row = tl.program_id(0).to(tl.int64)  # N * H may exceed 2**31
    input_ptr += row * input_stride
    value_ptr += row * value_stride
    out_ptr += row * out_stride
    h = tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    if addend_ptr is not None:
        addend_ptr += row * addend_stride
    ONCE: tl.constexpr = "evict_first" if EVICT_FIRST else ""

    if PDL and not WEIGHT_FIRST:
        tl.extra.cuda.gdc_wait()
    dot = tl.zeros([BLOCK_H], dtype=tl.float32)
    if UNROLL:
        # All loads are in flight before the first result is used.
        weights = ()
        for i in tl.static_range((H + BLOCK_H - 1) // BLOCK_H):
            weights = weights + (_load_chunk(weight_ptr, i, h, H, BLOCK_H, "", 0.0),)
        if PDL and WEIGHT_FIRST:
            tl.extra.cuda.gdc_wait()
        # The trigger never precedes the wait on the previous grid; otherwise later grids could read
        # a weight that has not been written.
        if PDL and TRIGGER_FIRST:
            tl.extra.cuda.gdc_launch_dependents()
        inputs = ()
        for i in tl.static_range((H + BLOCK_H - 1) // BLOCK_H):
            inputs = inputs + (_load_chunk(input_ptr, i, h, H, BLOCK_H, ONCE, 0.0),)
        values = ()
        addends = ()
        for i in tl.static_range((D + BLOCK_D - 1) // BLOCK_D):
            values = values + (_load_chunk(value_ptr, i, d, D, BLOCK_D, ONCE),)
            if addend_ptr is not None:
                addends = addends + (_load_chunk(addend_ptr, i, d, D, BLOCK_D, ONCE),)
        if PDL and not TRIGGER_FIRST:
            tl.extra.cuda.gdc_launch_dependents()
        for i in tl.static_range((H + BLOCK_H - 1) // BLOCK_H):
            dot += inputs[i].to(tl.float32) * weights[i].to(tl.float32)
    else:
        if PDL and WEIGHT_FIRST:
            tl.extra.cuda.gdc_wait()
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
        for start in range(0, H, BLOCK_H):
            inside = start + h < H
            x = tl.load(input_ptr + start + h, mask=inside, other=0.0, eviction_policy=ONCE)
            w = tl.load(weight_ptr + start + h, mask=inside, other=0.0)
            dot += x.to(tl.float32) * w.to(tl.float32)
    logit = tl.sum(dot, axis=0)
    if bias_ptr is not None:
        logit += tl.load(bias_ptr).to(tl.float32)
    if logit_ptr is not None:
        tl.store(logit_ptr + row, logit.to(logit_ptr.dtype.element_ty))
    gate = tl.sigmoid(logit)

    if UNROLL:
        for i in tl.static_range((D + BLOCK_D - 1) // BLOCK_D):
            out = gate * values[i].to(tl.float32)
            if addend_ptr is not None:
                out += addends[i].to(tl.float32)
            inside = None if (i + 1) * BLOCK_D <= D else i * BLOCK_D + d < D
            tl.store(out_ptr + i * BLOCK_D + d, out.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        for start in range(0, D, BLOCK_D):
            inside = start + d < D
            v = tl.load(value_ptr + start + d, mask=inside, eviction_policy=ONCE)
            out = gate * v.to(tl.float32)
            if addend_ptr is not None:
                a = tl.load(addend_ptr + start + d, mask=inside, eviction_policy=ONCE)
                out += a.to(tl.float32)
            tl.store(out_ptr + start + d, out.to(out_ptr.dtype.element_ty), mask=inside)


UNROLL_LIMIT = 16384
"""Widest row, in elements, that is kept in registers between the load and the product."""


FEW_ROWS = 256
"""Up to this many rows, latency limits a launch: more loads in flight help."""

MANY_WAVES = 8192
"""From this many rows on, bandwidth limits a launch at any width."""

WHOLE_ROWS_TO = 512 << 10
"""Bytes of input up to which, with programmatic dependent launch, a whole row is one load: each
program has a multiprocessor to itself."""

LATE_TRIGGER_TO = 56 << 10
"""Bytes of a row beyond which the next grid starts before a program's loads, however few they are:
a trigger after them keeps them all in registers at once, and wider rows spill."""

TRIGGER_FIRST_FROM = 7 << 18
"""Bytes of input, value and addend from which the next grid may start before a program's loads.
That costs each program 0.2 us; from this size on it gains more."""

SIXTEEN_WARPS_TO = 20 << 10
"""Bytes of a row up to which, with programmatic dependent launch, a few rows get 16 warps each. In
float32 at H = 7168 and 256 rows they take a third longer than 8."""

EVICT_ABOVE, EVICT_BELOW = 20 << 20, 15 << 20
"""Bytes. Rows are read once, so where a launch moves more than the first and its result is smaller
than the second, rows leave L2 first and the result stays there for its reader."""


def _block(width: int, whole: bool) -> int:
    """Elements per load: the whole row, or chunks of 1024 where they divide it."""
    padded = triton.next_power_of_2(width)
    if whole:
        return min(padded, 8192)
    return 1024 if width % 1024 == 0 else min(padded, 4096)


def launch_config(
    rows: int | None, h: int, d: int, itemsize: int = 2, *, addend: bool, dependent: bool = False
) -> LaunchConfig:
    """Launch rule for ``rows`` rows (None: symbolic) of ``h`` elements of input and ``d`` of value,
    each of ``itemsize`` bytes.

    dependent: with programmatic dependent launch, where a program's loads overlap the previous and
    the next grid. Measured on an H200 (``python -m benchmarks launch-config``) at 1 to 8192 rows of
    each width from 1024 to 7168: in bfloat16 at most 3 % slower than the best shape, and 5 % where
    the launch is not dependent; in float32 7 % and 5 %.
    """
    widest = max(h, d) * itemsize
    if rows is None:
        few_rows = many_waves = few_bytes = evict_first = False
        trigger_first = True
    else:
        row_bytes, result = rows * h * itemsize, rows * d * itemsize
        read = row_bytes + (2 if addend else 1) * result
        few_rows, many_waves = rows <= FEW_ROWS, rows >= MANY_WAVES
        trigger_first = widest > LATE_TRIGGER_TO or read >= TRIGGER_FIRST_FROM
        few_bytes = not trigger_first and row_bytes <= WHOLE_ROWS_TO
        evict_first = read + result > EVICT_ABOVE and result < EVICT_BELOW
    if dependent:
        few_rows = few_rows and trigger_first and widest <= SIXTEEN_WARPS_TO
        shape = _dependent_shape(h, d, few_bytes, few_rows, many_waves)
    else:
        shape = _shape(h, d, few_rows)
    return LaunchConfig(*shape, trigger_first, evict_first)


@functools.lru_cache(maxsize=1024)
def _shape(h: int, d: int, few_rows: bool) -> tuple[int, int, int]:
    """Elements per load and warps without dependent launch."""
    widest = max(h, d)
    whole = widest > (2048 if few_rows else 4096)
    return _fitting(_block(h, whole), _block(d, whole), 16 if whole else 4 if widest <= 1024 else 8)


@functools.lru_cache(maxsize=1024)
def _dependent_shape(
    h: int, d: int, few_bytes: bool, few_rows: bool, many_waves: bool
) -> tuple[int, int, int]:
    """The same with dependent launch. few_rows: few narrow rows, but more than few bytes."""
    widest = max(h, d)
    if few_bytes and 1024 < widest <= 4096:
        return _fitting(_block(h, True), _block(d, True), 16)
    if few_rows and h == d and h >= 4096 and h % 1024 == 0:
        return 2048, 2048, 16
    return _fitting(_block(h, False), _block(d, False), 4 if many_waves and widest <= 1024 else 8)


def _fitting(block_h: int, block_d: int, num_warps: int) -> tuple[int, int, int]:
    """Fewer warps where a thread would get less than four elements of a load."""
    return block_h, block_d, max(1, min(num_warps, max(block_h, block_d) // 128))


@functools.cache
def supports_pdl(device_index: int) -> bool:
    """Whether the device (compute capability 9.0 or later) and the installed Triton support
    programmatic dependent launch."""
    if torch.version.hip or not torch.cuda.is_available():
        return False
    if torch.cuda.get_device_capability(device_index) < (9, 0):
        return False
    from triton.backends.nvidia.compiler import CUDAOptions

    return "launch_pdl" in CUDAOptions.__dataclass_fields__ and hasattr(tl.extra.cuda, "gdc_wait")


def launch(
    input: torch.Tensor,
    weight: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    addend: torch.Tensor | None,
    out: torch.Tensor,
    logit: torch.Tensor | None = None,
    *,
    pdl: bool = False,
    weight_first: bool = False,
    config: LaunchConfig | None = None,
    batch_invariant: bool = False,
) -> None:
    """Launch the kernel on the current stream; writes ``out`` and, if given, ``logit``.

    Shapes: input ``[N, H]``, weight ``[1, H]`` contiguous, bias ``[1]``, value, addend and out
    ``[N, D]``, logit ``[N]``. Inner strides are 1, row strides are free. dtypes: float16, bfloat16
    or float32; operands may differ in dtype. batch_invariant: a launch shape that does not depend
    on the number of rows. Nothing is checked: :mod:`gatefuse.ops` does that.
    """
    rows, h = input.shape
    d = value.shape[1]
    if rows == 0 or d == 0:
        return
    if config is None:
        config = launch_config(
            None if batch_invariant else rows,
            h,
            d,
            value.element_size(),
            addend=addend is not None,
            dependent=pdl,
        )
    options = {"launch_pdl": True} if pdl else {}
    linear_sigmoid_mul_kernel[(rows,)](
        input,
        weight,
        bias,
        value,
        addend,
        out,
        logit,
        input.stride(0),
        value.stride(0),
        addend.stride(0) if addend is not None else 0,
        out.stride(0),
        H=h,
        D=d,
        BLOCK_H=config.block_h,
        BLOCK_D=config.block_d,
        UNROLL=max(h, d) <= UNROLL_LIMIT,
        PDL=pdl,
        WEIGHT_FIRST=weight_first,
        TRIGGER_FIRST=config.trigger_first,
        EVICT_FIRST=config.evict_first,
        num_warps=config.num_warps,
        **options,
    )
