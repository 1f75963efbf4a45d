"""The Triton kernel: on the CPU through Triton's interpreter, on a GPU for real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch

CASES = [
    # rows, H, D, dtype, row stride beyond the width, bias, addend, logit
    (3, 64, 64, "float32", 0, False, False, False),
    (3, 64, 64, "bfloat16", 8, True, True, True),
    (2, 100, 36, "float16", 4, True, False, True),
    (2, 2560, 2560, "bfloat16", 0, False, True, False),
    (2, 3072, 512, "float32", 0, True, True, False),
    (2, 1, 5, "float32", 0, False, False, True),
    (2, 20000, 70, "float32", 0, True, True, True),  # wider than what is kept in registers
    (1, 48, 17000, "bfloat16", 16, False, True, False),
]


def check_kernel(device, rows, h, d, dtype, extra, bias, addend, with_logit, **launch):
    """Runs the kernel on poisoned outputs; returns errors relative to float64 and to eager."""
    from gatefuse import kernels

    dtype = getattr(torch, dtype)

    def make(n, width):
        return torch.randn(n, width + extra, device=device).to(dtype)[:, :width]

    x, v = make(rows, h), make(rows, d)
    a = make(rows, d) if addend else None
    w = (torch.randn(1, h, device=device) / h**0.5).to(dtype)
    b = torch.randn(1, device=device).to(dtype) if bias else None
    out = torch.full((rows, d), torch.nan, dtype=dtype, device=device)
    logit = torch.full((rows,), torch.nan, device=device) if with_logit else None
    kernels.launch(x, w, v, b, a, out, logit, **launch)
    z = torch.nn.functional.linear(x.double(), w.double(), None if b is None else b.double())
    ref = torch.sigmoid(z) * v.double() + (0 if a is None else a.double())
    eager = torch.sigmoid(torch.nn.functional.linear(x, w, b)) * v
    eager = eager if a is None else a + eager
    return {
        "error": (out.double() - ref).norm().item(),
        "worst": (out.double() - ref).abs().max().item(),
        "eager": (eager.double() - ref).norm().item(),
        "eager_worst": (eager.double() - ref).abs().max().item(),
        "scale": ref.norm().item(),
        "largest": ref.abs().max().item(),
        "eps": torch.finfo(dtype).eps,
        "logit": 0.0 if logit is None else (logit.double() - z[:, 0]).abs().max().item(),
        "logit_bound": 64 * torch.finfo(torch.float32).eps * z.abs().max().item(),
    }


def assert_within_tolerance(r):
    # A NaN left from the poison fails each of these.
    assert r["error"] <= 2 * r["eager"] + r["eps"] * r["scale"], r
    assert r["worst"] <= 2 * r["eager_worst"] + r["eps"] * r["largest"], r
    assert r["logit"] <= r["logit_bound"], r


@pytest.fixture(scope="module")
def interpreted():
    """All cases in one process that has Triton's interpreter on, as it is chosen at import."""
    pytest.importorskip("triton")
    script = textwrap.dedent(
        """
        import json, sys, torch
        from tests.test_kernels import CASES, check_kernel
        torch.manual_seed(0)
        plain = [check_kernel("cpu", *case) for case in CASES]
        empty = torch.empty(0, 8)
        from gatefuse import kernels
        kernels.launch(empty, torch.ones(1, 8), empty, None, None, empty)
        json.dump(plain, sys.stdout)
        """
    )
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    run = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=root,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("i", range(len(CASES)), ids=[f"{c[1]}x{c[2]}-{c[3]}" for c in CASES])
def test_interpreted(interpreted, i):
    assert_within_tolerance(interpreted[i])


def test_launch_rule_covers_any_width():
    pytest.importorskip("triton")
    from gatefuse.kernels import launch_config

    for h in [1, 2, 31, 64, 1000, 2048, 2560, 3584, 5120, 7168, 8191, 12288, 100_000]:
        for d in (h, 64):
            for rows in (None, 1, 64, 256, 1024, 100_000):
                for dependent in (False, True):
                    c = launch_config(rows, h, d, addend=True, dependent=dependent)
                    for n in (c.block_h, c.block_d, c.num_warps):
                        assert n & (n - 1) == 0 and n > 0
                    # A thread holds at most 16 elements of a load, and no chunk is all padding.
                    assert max(c.block_h, c.block_d) <= 16 * 32 * c.num_warps or max(h, d) < 128
                    assert c.block_h < 2 * h or h == 1


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=[f"{c[1]}x{c[2]}-{c[3]}" for c in CASES])
@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_on_gpu(case, pdl, first):
    from gatefuse import kernels

    if pdl and not kernels.supports_pdl(0):
        pytest.skip("the device or Triton has no programmatic dependent launch")
    rows, h, d, dtype, *_, addend, _ = case
    itemsize = getattr(torch, dtype).itemsize
    config = kernels.launch_config(rows, h, d, itemsize, addend=addend, dependent=pdl)
    config = config._replace(trigger_first=first, evict_first=first)
    assert_within_tolerance(check_kernel("cuda", *case, pdl=pdl, weight_first=pdl, config=config))


@pytest.mark.gpu
def test_beyond_two_to_the_31_elements():
    from gatefuse import kernels

    rows, h = 2**20 + 3, 2048
    assert rows * h > 2**31
    x = torch.empty(rows, h, dtype=torch.bfloat16, device="cuda").normal_()
    w = torch.randn(1, h, device="cuda", dtype=torch.bfloat16) / h**0.5
    out = torch.full_like(x, torch.nan)
    kernels.launch(x, w, x, None, None, out)
    for part in (slice(0, 512), slice(rows - 512, rows)):
        ref = torch.sigmoid(x[part].double() @ w.double().T) * x[part].double()
        assert (out[part].double() - ref).norm() <= 3e-3 * ref.norm()
    assert not out.isnan().any()


@pytest.mark.gpu
def test_pdl_sees_what_the_kernel_before_wrote():
    """A chain of dependent launches in a CUDA graph: each reads what the one before wrote."""
    from gatefuse import kernels

    if not kernels.supports_pdl(0):
        pytest.skip("the device or Triton has no programmatic dependent launch")
    rows, h, depth = 64, 2048, 50
    w = torch.nn.Parameter(torch.randn(1, h, device="cuda") / h**0.5, requires_grad=False)
    x = torch.randn(rows, h, device="cuda")
    buffers = [torch.empty_like(x) for _ in range(depth)]
    config = kernels.launch_config(rows, h, h, 4, addend=False)  # sums in one order

    def chain(pdl):
        source = x
        for buffer in buffers:
            kernels.launch(
                source, w, source, None, x, buffer, pdl=pdl, weight_first=pdl, config=config
            )
            source = buffer
        return source

    want = chain(False).clone()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        chain(True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        chain(True)
    for _ in range(20):
        for buffer in buffers:
            buffer.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(buffers[-1], want)
