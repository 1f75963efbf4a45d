"""Draws results as SVG: time against the number of tokens, and what the gate costs.

The same results give the same file, byte for byte.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import pandas as pd

from benchmarks import grid, tables
from benchmarks.store import Results, matches
from benchmarks.tables import EAGER, GATEFUSE, INDUCTOR, LABELS, OP, ROOFLINE, TITLES, select

Providers = Iterable[tables.ProviderKey]
STYLES: dict[tables.ProviderKey, dict[str, Any]] = {
    EAGER: {"color": "#999999"},
    INDUCTOR: {"color": "#0072B2"},
    ("inductor", "max-autotune"): {"color": "#56B4E9"},
    ("inductor", "coordinate-descent"): {"color": "#009E73"},
    GATEFUSE: {"color": "#D55E00", "linewidth": 2.5},
    ("gatefuse-auto", "max-autotune"): {"color": "#D55E00", "linestyle": "--"},
    ("gatefuse-auto", "coordinate-descent"): {"color": "#D55E00", "linestyle": "-."},
    ("gatefuse-inline", "default"): {"color": "#CC79A7", "linestyle": "--"},
    ("gatefuse-kernel", "default"): {"color": "#CC79A7", "linestyle": "-."},
    OP: {"color": "#E69F00"},
    ROOFLINE: {"color": "#000000", "linestyle": ":"},
}
SUMMARY = (EAGER, INDUCTOR, ("inductor", "max-autotune"), GATEFUSE, ROOFLINE)


def _lines(axis: Any, rows: pd.DataFrame, column: str, providers: Providers, size: int = 3) -> None:
    for name, mode in providers:
        points = rows[matches(rows, {"provider": name, "mode": mode})].dropna(subset=column)
        if len(points):
            label = LABELS[name, mode].replace("*", "").replace("`", "")
            style = STYLES[name, mode] | {"marker": "o", "markersize": size}
            axis.plot(points["N"], points[column], label=label, **style)
    axis.set(xscale="log", xlabel="tokens")
    axis.grid(which="major", alpha=0.3)


def _times(axis: Any, rows: pd.DataFrame, providers: Providers, title: str) -> None:
    _lines(axis, rows, "median_us", providers)
    axis.set(yscale="log", title=title)


def _costs(axis: Any, results: Results, H: int, title: str) -> None:
    _lines(axis, select(results.cases, "glue", H), "cost_us", (INDUCTOR, GATEFUSE), size=4)
    axis.axhline(0, color="#000000", linewidth=0.8)
    axis.set(yscale="symlog", title=title)
    axis.set_yticks([-10, -1, 0, 1, 10, 100], ["-10", "-1", "0", "1", "10", "100"])


def draw_times(results: Results, H: int) -> Any:
    """Time against tokens, log-log, every provider, one panel for each workload."""
    figure, axes = plt.subplots(1, len(grid.WORKLOADS), figsize=(13, 4.8), sharex=True)
    handles: dict[str, Any] = {}
    for axis, workload in zip(axes, grid.WORKLOADS):
        title = TITLES[workload].split(":")[0].strip("`")
        _times(axis, select(results.cases, workload, H), tuple(STYLES), title)
        found, labels = axis.get_legend_handles_labels()
        handles = dict(zip(labels, found)) | handles
    axes[0].set_ylabel(f"µs, H = {H}, {grid.DTYPE}")
    shown = {"loc": "lower center", "ncols": 4, "frameon": False, "fontsize": 9}
    figure.legend(list(handles.values()), list(handles), **shown)
    figure.tight_layout(rect=(0, 0.16, 1, 1))
    return figure


def draw_gate_cost(results: Results) -> Any:
    figure, axes = plt.subplots(1, len(grid.WIDTHS), figsize=(9, 3.6), sharex=True, squeeze=False)
    for axis, H in zip(axes[0], grid.WIDTHS):
        _costs(axis, results, H, f"H = {H}")
    axes[0][0].set_ylabel("cost of the gate, µs")
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    return figure


def draw_summary(results: Results, H: int) -> Any:
    figure, (times, costs) = plt.subplots(1, 2, figsize=(9, 3.8))
    _times(times, select(results.cases, "mul", H), SUMMARY, "the gate alone, µs")
    _costs(costs, results, H, "what it costs in a decoder layer, µs")
    for axis in (times, costs):
        axis.legend(frameon=False, fontsize=8)
    figure.suptitle(f"H = {H}, {grid.DTYPE}", fontsize=10)
    figure.tight_layout()
    return figure


def draw_all(results: Results, directory: Path) -> None:
    plt.rcParams.update({"svg.hashsalt": "gatefuse", "svg.fonttype": "none"})
    figures = {
        "times": draw_times(results, grid.WIDTHS[0]),
        "gate-cost": draw_gate_cost(results),
        "summary": draw_summary(results, grid.WIDTHS[0]),
    }
    for name, figure in figures.items():
        figure.savefig(directory / f"{name}.svg", metadata={"Date": None})
        plt.close(figure)
