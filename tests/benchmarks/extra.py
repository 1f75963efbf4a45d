"""Skips the laboratory's tests where what it needs is not installed."""

from __future__ import annotations

import pytest


def need() -> None:
    for name in ("filelock", "matplotlib", "pandas", "pebble", "tabulate"):
        pytest.importorskip(name, reason="needs the extra `benchmarks`")
