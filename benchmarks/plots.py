"""Draws the plots of README.md and docs from the committed results.

    python -m benchmarks.plots [--out docs/images]

Needs matplotlib (``pip install 'gatefuse[bench]'``).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from benchmarks import grid
from benchmarks.readme import CHAINS, GATEFUSE, load
from benchmarks.report import LIMIT, ArmKey, Key, Results
from benchmarks.results import ROOT

INDUCTOR: ArmKey = ("inductor", "default")
STYLES: dict[ArmKey, dict[str, Any]] = {
    ("eager", "-"): {"label": "eager", "color": "#999999"},
    INDUCTOR: {"label": "Inductor", "color": "#0072B2"},
    ("inductor", "max-autotune"): {"label": "Inductor, max-autotune", "color": "#56B4E9"},
    ("inductor", "coordinate-descent"): {
        "label": "Inductor, coordinate descent",
        "color": "#009E73",
    },
    GATEFUSE: {"label": "gatefuse", "color": "#D55E00", "linewidth": 2.5},
    LIMIT: {"label": "torch.add / torch.addcmul", "color": "#000000", "linestyle": ":"},
}


def keys_of(results: Results, chain: str, H: int) -> list[Key]:
    """The static cells of a chain at a width, by the number of tokens."""
    return sorted(k for k in results.cells if k[:3] == ("static", chain, H) and k[4] == grid.DTYPE)


def draw_times(results: Results, H: int) -> plt.Figure:
    """Time against tokens, log-log, one panel for each chain."""
    figure, axes = plt.subplots(1, len(CHAINS), figsize=(13, 4.2), sharex=True)
    for axis, (chain, title) in zip(axes, CHAINS.items(), strict=True):
        keys = keys_of(results, chain, H)
        for arm, style in STYLES.items():
            points = [(k[3], t) for k in keys if (t := results.time(k, arm)) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3, **style)
        axis.set(xscale="log", yscale="log", xlabel="tokens", title=title.split(":")[0].strip("`"))
        axis.grid(which="major", alpha=0.3)
    axes[0].set_ylabel(f"µs, H = {H}")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=6, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    return figure


def draw_gate_cost(results: Results) -> plt.Figure:
    """What the gate costs in the glue: with it minus without, in default mode, by width."""
    figure, axes = plt.subplots(1, len(grid.WIDTHS), figsize=(9, 3.6), sharex=True)
    for axis, H in zip(axes, grid.WIDTHS, strict=True):
        keys = keys_of(results, "glue", H)
        for arm in (INDUCTOR, GATEFUSE):
            points = [(k[3], c) for k in keys if (c := results.gate_cost(k, arm)) is not None]
            axis.plot(*zip(*points, strict=True), marker="o", markersize=4, **STYLES[arm])
        axis.axhline(0, color="#000000", linewidth=0.8)
        axis.set(xscale="log", yscale="symlog", xlabel="tokens", title=f"H = {H}")
        axis.set_yticks([-10, -1, 0, 1, 10, 100], ["-10", "-1", "0", "1", "10", "100"])
        axis.grid(which="major", alpha=0.3)
    axes[0].set_ylabel("cost of the gate, µs")
    axes[0].legend(frameon=False)
    figure.tight_layout()
    return figure


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    # The same results give the same file, byte for byte.
    plt.rcParams.update({"svg.hashsalt": "gatefuse", "svg.fonttype": "none"})
    results = load()
    figures = {"times": draw_times(results, grid.WIDTHS[0]), "gate-cost": draw_gate_cost(results)}
    for name, figure in figures.items():
        figure.savefig(args.out / f"{name}.svg", metadata={"Date": None})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
