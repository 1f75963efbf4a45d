"""Shared set-up: fixed seeds, a fresh Dynamo per test, no cached graphs, the `gpu` marker."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path


def own_folder(name: str) -> str:
    """A folder that goes when this process ends."""
    folder = tempfile.mkdtemp(prefix=f"gatefuse-{name}-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


# Before torch is imported. A cached graph skips the pass, so only test_cache.py turns the caches of
# graphs on, in processes of its own. What a compiler made of a kernel's text is kept for the next
# test with the same text. Two threads compile, one computes: the suite is made for two cores.
os.environ["TORCHINDUCTOR_FX_GRAPH_CACHE"] = "0"
os.environ["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "0"
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "2")
os.environ.setdefault("OMP_NUM_THREADS", "1")
for name in [name for name in os.environ if name.startswith("GATEFUSE_")]:
    del os.environ[name]
# Linking a C++ kernel reads PyTorch's symbols and takes a good part of its build; gold, where there
# is one that the compiler can use, is faster at it. GCC looks for a linker here first.
tools = [shutil.which(name) for name in (os.environ.get("CXX", "g++"), "ld.gold")]
if "COMPILER_PATH" not in os.environ and all(tools):
    linkers = own_folder("linker")
    Path(linkers, "ld").symlink_to(tools[1])
    empty_library = [tools[0], "-shared", "-x", "c++", os.devnull, "-o", f"{linkers}/empty.so"]
    with_gold = os.environ | {"COMPILER_PATH": linkers}
    if subprocess.run(empty_library, env=with_gold, capture_output=True).returncode == 0:
        os.environ |= with_gold
# Compiled C++ lives in a directory of this run, of all its workers: no test depends on an earlier
# run's files.
if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = own_folder("inductor")

import pytest
import torch

import gatefuse

# pytest gives its handlers to loggers that do not propagate, and this one with a handler makes
# PyTorch write its structured trace: a tenth of the time of a compile.
trace_log = logging.getLogger("torch.__trace")
trace_log.propagate = True


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
    trace_log.propagate = True
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    gatefuse.disable()
    torch._dynamo.reset()


@pytest.fixture(scope="session", autouse=True)
def _unmeasured_guards() -> Iterator[None]:
    """Dynamo measures how long a frame's guards take: another tenth."""
    with pytest.MonkeyPatch.context() as patch:
        name = "torch._dynamo.guards.profile_guard_manager"
        patch.setattr(name, lambda *args: 0.0, raising=False)
        yield


@pytest.fixture(scope="session", autouse=True)
def _vector_instructions() -> None:
    """Inductor compiles and loads programs to find out which ones work. What this process finds
    holds for its children: a first compile in one takes 8 s then, not 18."""
    from torch._inductor import config, cpu_vec_isa

    supported = cpu_vec_isa.valid_vec_isa_list()
    cpu_vec_isa.valid_vec_isa_list.cache_clear()
    with config.patch({"cpp.vec_isa_ok": True}):
        if cpu_vec_isa.valid_vec_isa_list() == supported:
            os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
    cpu_vec_isa.valid_vec_isa_list.cache_clear()
