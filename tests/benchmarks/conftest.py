"""No reasons from the committed file: the tests bring their own."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _no_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pandas", reason="needs the extra `benchmarks`")
    from benchmarks import thresholds

    monkeypatch.setattr(thresholds, "reasons", list)
