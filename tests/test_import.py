"""`import gatefuse` is light: it initialises nothing and imports no compiler."""

from __future__ import annotations

import json

from tests.support.programs import run_python

LIMIT = 0.050  # seconds, after `import torch`


def test_import_is_fast() -> None:
    code = """
        import time, torch
        start = time.perf_counter()
        import gatefuse
        print(time.perf_counter() - start)
    """
    times: list[float] = []
    for _ in range(5):
        times.append(float(run_python(code).stdout))
        if times[-1] <= LIMIT:
            return
    raise AssertionError(f"import gatefuse took {min(times):.3f} s at best of {len(times)}")


def test_import_imports_no_compiler_and_starts_no_device() -> None:
    code = """
        import json, sys, torch
        before = set(sys.modules)
        import gatefuse
        new = sorted(set(sys.modules) - before)
        print(json.dumps({"new": new, "cuda": torch.cuda.is_initialized()}))
    """
    result = json.loads(run_python(code).stdout)
    heavy = ("torch._inductor", "torch._dynamo", "triton", "vllm", "transformers")
    assert not [name for name in result["new"] if name.startswith(heavy)]
    assert not result["cuda"]


def test_public_names() -> None:
    """Every name of `__all__` exists, also those that are imported on demand."""
    import gatefuse

    for name in gatefuse.__all__:
        assert getattr(gatefuse, name) is not None
    assert not hasattr(gatefuse, "no_such_name")
