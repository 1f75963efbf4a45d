"""Every figure of the committed results is the one that was published before.

golden.json was written by the code before the laboratory was moved and rewritten, in today's words.
A new result file changes figures; then what changed is written into it, after a look at each.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.extra import need

need()

from benchmarks import plots, publish, store, thresholds
from benchmarks.grid import WIDTHS
from benchmarks.store import ROOT, Results
from benchmarks.tables import Tables

GOLDEN: dict[str, Any] = json.loads(Path(__file__).with_name("golden.json").read_text())
SECTIONS = {
    "main": "Every provider",
    "alone": "The gate alone",
    "peer": "Beside the best known kernel",
    "gate-cost": "What the gate costs in a layer's glue",
    "variants": "With other neighbours",
    "widths": "Other widths: gatefuse over Inductor",
    "dtypes": "Other dtypes: gatefuse over Inductor",
    "dynamic": "Symbolic sizes: gatefuse over Inductor",
    "training": "Training: gatefuse over Inductor (the limit over gatefuse)",
    "blocks": "Modules of transformers",
    "host": "Host and compile time",
    "cpu": "CPU",
    "engines": "Engines of vLLM",
}


@pytest.fixture(scope="module")
def results() -> Results:
    return store.committed()


@pytest.fixture(autouse=True)
def _with_reasons(_no_reasons: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()


def rows_of(parts: list[str]) -> list[str]:
    lines = [line for part in parts for line in part.splitlines()]
    return [
        "|".join(cell.strip().removesuffix(" ‡") for cell in line.strip()[1:-1].split("|"))
        for line in lines
        if line.startswith("|") and not line.startswith("|:")
    ]


@pytest.mark.parametrize("name", SECTIONS)
def test_every_table_has_the_same_figures(name: str, results: Results) -> None:
    found = rows_of(publish.SECTIONS[SECTIONS[name]](Tables(results)))
    assert found == GOLDEN["tables"][name]


def test_the_same_thresholds_are_violated_with_the_same_reasons(results: Results) -> None:
    found = [
        [str(violation), re.findall(r"[\d.]+\d", violation.reason or "")]
        for violation in thresholds.violations(results)
    ]
    assert sorted(found) == sorted(GOLDEN["violations"])
    assert not any(violation.reason is None for violation in thresholds.violations(results))


def test_the_summary_has_the_same_figures(results: Results) -> None:
    _, table, counts = publish.summary(Tables(results))
    before = {row.partition("|")[2] for row in GOLDEN["summary"]}
    assert {row.partition("|")[2] for row in rows_of([table])} <= before
    assert [int(n) for n in re.findall(r"\d+", counts)] == GOLDEN["counts"]


@pytest.mark.parametrize("name", GOLDEN["plots"])
def test_the_plots_have_the_same_points(name: str, results: Results) -> None:
    figure = {
        "times": lambda: plots.draw_times(results, WIDTHS[0]),
        "gate-cost": lambda: plots.draw_gate_cost(results),
        "summary": lambda: plots.draw_summary(results, WIDTHS[0]),
    }[name]()
    found = [
        [[float(f"{y:.6g}") for y in line.get_ydata()] for line in axis.get_lines()]
        for axis in figure.axes
    ]
    assert found == GOLDEN["plots"][name]
    plots.plt.close(figure)


def test_the_launch_rule_has_the_same_distance_from_the_best() -> None:
    pytest.importorskip("triton")
    from benchmarks import run_launch_config

    (path,) = (ROOT / "benchmarks" / "results").glob("*launch-rule*.json")
    found = run_launch_config.summary(json.loads(path.read_text())["rows"])
    assert found == GOLDEN["launch-config"]


def test_the_launch_rule_is_near_the_best_launch() -> None:
    """By the measurements since then, in bfloat16 and float32."""
    pytest.importorskip("triton")
    from benchmarks import run_launch_config

    for path in (ROOT / "benchmarks" / "results").glob("*launch-config*.json"):
        for line in run_launch_config.summary(json.loads(path.read_text())["rows"]):
            ratios = [float(ratio) for ratio in re.findall(r"N=\d+ ([\d.]+)", line)]
            assert len(ratios) == 5
            assert max(ratios) <= 1.07, line


def test_what_is_published_is_that_of_the_committed_results() -> None:
    for path, text in publish.published().items():
        assert path.read_text() == text, f"{path} is not what `python -m benchmarks publish` writes"
