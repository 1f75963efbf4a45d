"""No reasons from the committed file: the tests bring their own."""

from __future__ import annotations

import pytest

from tests.benchmarks.extra import need


@pytest.fixture(autouse=True)
def _no_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    need()
    from benchmarks import thresholds

    monkeypatch.setattr(thresholds, "reasons", list)
