"""Shared set-up: deterministic seeds, a fresh Dynamo per test, caches off, the `gpu` marker."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

# Before torch is imported. A warm cache skips the pass, so only test_cache.py turns caches on, in
# processes of its own. Two threads compile, one computes: the suite is made for two cores.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "2")
os.environ.setdefault("OMP_NUM_THREADS", "1")
for name in [name for name in os.environ if name.startswith("GATEFUSE_")]:
    del os.environ[name]

import pytest
import torch

import gatefuse


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a GPU; skipped where there is none")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA or HIP device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    """Every test starts with a fixed seed, nothing compiled and gatefuse off, and ends so."""
    # Torch's structured trace is for its own handlers; pytest would print it with every failure.
    logging.getLogger("torch.__trace").propagate = False
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    gatefuse.disable()
    torch._dynamo.reset()


@pytest.fixture(scope="session", autouse=True)
def _code_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Compiled C++ lives in a directory of this run: no test depends on an earlier run's files."""
    os.environ.setdefault(
        "TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "inductor")
    )
