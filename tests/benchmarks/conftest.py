"""The laboratory imports the libraries of the extra `benchmarks`: without them its tests skip."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

_LIBRARIES = ("filelock", "matplotlib", "pandas", "pebble", "tabulate")
_MISSING = [name for name in _LIBRARIES if find_spec(name) is None]


class _Skipped(pytest.Module):
    def collect(self) -> list[pytest.Item | pytest.Collector]:
        pytest.skip(f"needs the extra `benchmarks`: no {', '.join(_MISSING)}")


def pytest_pycollect_makemodule(
    module_path: Path, parent: pytest.Collector
) -> pytest.Module | None:
    """Modules here import the laboratory, and it its libraries."""
    return _Skipped.from_parent(parent, path=module_path) if _MISSING else None
