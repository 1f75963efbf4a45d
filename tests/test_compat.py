"""Versions of PyTorch that gatefuse was not tested on."""

from __future__ import annotations

import pytest

from gatefuse import compat
from tests.support.comparison import BACKEND, report_of


@pytest.mark.parametrize("version", [(2, 5), (2, 99)], ids=["too-old", "too-new"])
def test_unknown_torch_compiles_unfused_and_warns(
    monkeypatch: pytest.MonkeyPatch, version: tuple[int, int]
) -> None:
    monkeypatch.setattr(compat, "_torch_version", lambda: version)
    monkeypatch.setattr(compat, "_warned", set())
    with pytest.warns(UserWarning, match="not among the versions gatefuse was tested on"):
        report = report_of(backend=BACKEND)
    assert report.fused == 0


def test_untested_torch_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "_torch_version", lambda: (2, 99))
    monkeypatch.setenv("GATEFUSE_ALLOW_UNTESTED_TORCH", "1")
    assert report_of(backend=BACKEND).fused == 1
