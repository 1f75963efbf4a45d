"""Work over processes: failures, deaths, deadlines, and who has the device."""

from __future__ import annotations

import time

import pytest

from tests.benchmarks.extra import need

need()

from benchmarks.sweep import spread
from tests.benchmarks.work import work


def test_spread_survives_failing_and_dying_work() -> None:
    items = ["die", "raise", "one", "two"]
    found = {
        item: (result, error)
        for item, result, error in spread(work, items, 2, time.monotonic() + 300)
    }
    assert sorted(found) == sorted(items)
    assert found["one"] == ("one done", None)
    assert found["two"] == ("two done", None)
    assert found["die"] == (None, "the process died")
    assert found["raise"][0] is None
    assert "ValueError: a reason" in str(found["raise"][1])


def test_one_process_at_a_time_has_the_device() -> None:
    items = ["hold 1", "hold 2", "hold 3"]
    found = [result for _, result, _ in spread(work, items, 3, time.monotonic() + 300)]
    spans = sorted(tuple(map(float, str(result).split())) for result in found)
    assert len(spans) == 3
    assert all(end <= begin for (_, end), (begin, _) in zip(spans, spans[1:]))


def test_spread_starts_nothing_after_the_deadline() -> None:
    assert list(spread(work, ["one"], 1, time.monotonic() - 1)) == []


def test_spread_abandons_what_outlasts_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.sweep.GRACE_S", 0.5)
    begin = time.monotonic()
    assert list(spread(work, ["sleep", "one"], 1, begin + 0.2)) == []
    assert time.monotonic() - begin < 60
