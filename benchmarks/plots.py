"""Draws results as SVG: time against the number of tokens, and what the gate costs.

The same results give the same file, byte for byte. Needs matplotlib
(``pip install 'gatefuse[bench]'``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from benchmarks import grid
from benchmarks.grid import Key
from benchmarks.store import GATEFUSE, INDUCTOR, LIMIT, ArmKey, Results
from benchmarks.tables import ARMS, CHAINS

STYLES: dict[ArmKey, dict[str, Any]] = {
    ("eager", "-"): {"color": "#999999"},
    INDUCTOR: {"color": "#0072B2"},
    ("inductor", "max-autotune"): {"color": "#56B4E9"},
    ("inductor", "coordinate-descent"): {"color": "#009E73"},
    GATEFUSE: {"color": "#D55E00", "linewidth": 2.5},
    ("gatefuse-auto", "max-autotune"): {"color": "#D55E00", "linestyle": "--"},
    ("gatefuse-auto", "coordinate-descent"): {"color": "#D55E00", "linestyle": "-."},
    ("gatefuse-inline", "default"): {"color": "#CC79A7", "linestyle": "--"},
    ("gatefuse-kernel", "default"): {"color": "#CC79A7", "linestyle": "-."},
    ("op", "-"): {"color": "#E69F00"},
    LIMIT: {"color": "#000000", "linestyle": ":"},
}
SUMMARY = (("eager", "-"), INDUCTOR, ("inductor", "max-autotune"), GATEFUSE, LIMIT)


def label(arm: ArmKey) -> str:
    return ARMS[arm].replace("*", "").replace("`", "")


def keys_of(results: Results, chain: str, H: int, dtype: str, device: str) -> list[Key]:
    """The static cells of a chain at a width, by the number of tokens."""
    return sorted(
        k
        for k in results.cells
        if (k.shapes, k.chain, k.H, k.dtype, k.device) == ("static", chain, H, dtype, device)
    )


def draw_times(results: Results, H: int, dtype: str, device: str) -> Any:
    """Time against tokens, log-log, every arm, one panel for each chain."""
    figure, axes = plt.subplots(1, len(grid.MAIN), figsize=(13, 4.8), sharex=True)
    handles: dict[str, Any] = {}
    for axis, chain in zip(axes, grid.MAIN):
        keys = keys_of(results, chain, H, dtype, device)
        _lines(axis, results, keys, tuple(STYLES), handles)
        axis.set_title(CHAINS[chain].split(":")[0].strip("`"))
    axes[0].set_ylabel(f"µs, H = {H}, {dtype}")
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="lower center",
        ncols=4,
        frameon=False,
        fontsize=9,
    )
    figure.tight_layout(rect=(0, 0.16, 1, 1))
    return figure


def _lines(
    axis: Any, results: Results, keys: list[Key], arms: tuple[ArmKey, ...], handles: dict[str, Any]
) -> None:
    for arm in arms:
        points = [(k.N, t) for k in keys if (t := results.time(k, arm)) is not None]
        if points:
            (line,) = axis.plot(*zip(*points), marker="o", markersize=3, **STYLES[arm])
            handles.setdefault(label(arm), line)
    axis.set(xscale="log", yscale="log", xlabel="tokens")
    axis.grid(which="major", alpha=0.3)


def _costs(axis: Any, results: Results, H: int, dtype: str, device: str) -> None:
    keys = keys_of(results, "glue", H, dtype, device)
    for arm in (INDUCTOR, GATEFUSE):
        points = [(k.N, c) for k in keys if (c := results.gate_cost(k, arm)) is not None]
        if points:
            axis.plot(*zip(*points), marker="o", markersize=4, label=label(arm), **STYLES[arm])
    axis.axhline(0, color="#000000", linewidth=0.8)
    axis.set(xscale="log", yscale="symlog", xlabel="tokens")
    axis.set_yticks([-10, -1, 0, 1, 10, 100], ["-10", "-1", "0", "1", "10", "100"])
    axis.grid(which="major", alpha=0.3)


def _legend(axis: Any) -> None:
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize=8)


def draw_gate_cost(results: Results, widths: list[int], dtype: str, device: str) -> Any:
    """What the gate costs in the glue: with it minus without, in default mode, by width."""
    figure, axes = plt.subplots(
        1, len(widths), figsize=(4.5 * len(widths), 3.6), sharex=True, squeeze=False
    )
    for axis, H in zip(axes[0], widths):
        _costs(axis, results, H, dtype, device)
        axis.set_title(f"H = {H}")
    axes[0][0].set_ylabel("cost of the gate, µs")
    _legend(axes[0][0])
    figure.tight_layout()
    return figure


def draw_summary(results: Results, H: int, dtype: str, device: str) -> Any:
    """One picture: the gate alone, and what it costs in a layer."""
    figure, (times, costs) = plt.subplots(1, 2, figsize=(9, 3.8))
    handles: dict[str, Any] = {}
    _lines(times, results, keys_of(results, "mul", H, dtype, device), SUMMARY, handles)
    times.set(title="the gate alone, µs")
    times.legend(list(handles.values()), list(handles), frameon=False, fontsize=8)
    _costs(costs, results, H, dtype, device)
    costs.set(title="what it costs in a decoder layer, µs")
    _legend(costs)
    figure.suptitle(f"H = {H}, {dtype}", fontsize=10)
    figure.tight_layout()
    return figure


def draw_all(results: Results, directory: Path) -> list[Path]:
    """Write every plot that the results have numbers for; returns the files."""
    keys = [k for k in results.cells if k.shapes == "static" and k.chain in grid.MAIN]
    if not keys:
        return []
    plt.rcParams.update({"svg.hashsalt": "gatefuse", "svg.fonttype": "none"})
    first = min(keys, key=lambda k: (k.device == "cpu", k.dtype != grid.DTYPE))
    dtype, device = first.dtype, first.device
    found = sorted({k.H for k in keys if (k.dtype, k.device) == (dtype, device)})
    widths = [H for H in grid.WIDTHS if H in found] or found[:1]
    figures = {
        "times": draw_times(results, widths[0], dtype, device),
        "gate-cost": draw_gate_cost(results, widths, dtype, device),
        "summary": draw_summary(results, widths[0], dtype, device),
    }
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in figures.items():
        paths.append(directory / f"{name}.svg")
        figure.savefig(paths[-1], metadata={"Date": None})
        plt.close(figure)
    return paths
