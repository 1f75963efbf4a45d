"""Tables of the results, and whether they reach their marks.

    python -m benchmarks.report RESULTS.json... [--check] [--partial]

Prints Markdown. Of several files that measured the same cell, the last one counts, whole: a ratio
is never taken across runs. With ``--check``, names every cell that misses a mark of
:mod:`benchmarks.grid` and exits with 1 if there is one; a failed arm and a cell that was not
measured are misses too, the latter unless ``--partial``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import grid

Row = dict[str, Any]
Key = tuple[str, str, int, int, str]  # shapes, chain, H, N, dtype
ArmKey = tuple[str, str]  # arm, mode

EAGER: ArmKey = ("eager", "-")
LIMIT: ArmKey = ("limit", "-")
# Shown beside the arms and no rivals: the limit is no gate, and the op called by itself is the same
# kernel with programmatic dependent launch, which generated code cannot ask for.
BESIDE = (LIMIT, ("op", "-"))


@dataclass
class Results:
    """``cells[key][arm, mode]`` is a row of core's results; ``host`` are the rows of host's."""

    cells: dict[Key, dict[ArmKey, Row]] = field(default_factory=dict)
    host: list[Row] = field(default_factory=list)
    headers: list[dict[str, Any]] = field(default_factory=list)

    def time(self, key: Key, arm: ArmKey) -> float | None:
        """Median in µs, or None if the arm was not measured or failed."""
        return self.cells.get(key, {}).get(arm, {}).get("median_us")

    def gate_cost(self, key: Key, arm: ArmKey) -> float | None:
        """Time of ``arm`` in the glue at ``key`` minus that without the gate, compiled by Inductor
        in the same mode (eager against eager), in µs."""
        shapes, _, H, N, dtype = key
        plain = EAGER if arm == EAGER else ("inductor", arm[1])
        without = self.time((shapes, "glue_nogate", H, N, dtype), plain)
        with_gate = self.time((shapes, "glue", H, N, dtype), arm)
        return None if with_gate is None or without is None else with_gate - without


def collect(files: Iterable[dict[str, Any]]) -> Results:
    """Merge the contents of result files, in order."""
    results = Results()
    for content in files:
        results.headers.append(content["header"])
        if content["kind"] == "host":
            results.host = content["rows"]
            continue
        if content["kind"] != "core":
            continue
        fresh: dict[Key, dict[ArmKey, Row]] = {}
        for row in content["rows"]:
            key = (row["shapes"], row["chain"], row["H"], row["N"], row["dtype"])
            arms = fresh.setdefault(key, {})
            arm = (row["arm"], row["mode"])
            arms[arm] = better(arms[arm], row) if arm in arms else row
        results.cells |= fresh
    return results


def better(a: Row, b: Row) -> Row:
    """Of two draws the faster one; a draw that failed stands for all."""
    if "error" in a or "error" in b:
        return a if "error" in a else b
    return min(a, b, key=lambda row: row["median_us"])


def name_of(key: Key) -> str:
    shapes, chain, H, N, dtype = key
    parts = [chain, f"H={H}", f"N={N}"]
    parts += [shapes] if shapes != "static" else []
    parts += [dtype] if dtype != grid.DTYPE else []
    return " ".join(parts)


def check(results: Results, partial: bool = False) -> list[str]:
    """One line for each mark that is missed, by cell."""
    misses: list[str] = []
    for key, arms in sorted(results.cells.items()):
        shapes, chain, _, N, _ = key
        for (arm, mode), row in arms.items():
            if "error" in row:
                misses.append(f"{name_of(key)}: {arm}, {mode} failed: {row['error']}")
        for mode in grid.MODES:
            ours, theirs = (results.time(key, (a, mode)) for a in ("gatefuse-auto", "inductor"))
            if ours is not None and theirs is not None and ours > grid.NOISE * theirs:
                misses.append(
                    f"{name_of(key)}: {mode}: gatefuse {ours:.2f} us is {ours / theirs:.3f} of "
                    f"Inductor's {theirs:.2f}"
                )
        ours = results.time(key, ("gatefuse-auto", "default"))
        if chain in ("mul", "add") and shapes == "static" and ours is not None:
            others = {a: t for a in arms if a not in BESIDE and (t := results.time(key, a))}
            best = min(others, key=others.__getitem__)
            if ours > grid.NOISE * others[best]:
                misses.append(
                    f"{name_of(key)}: gatefuse {ours:.2f} us is {ours / others[best]:.3f} of the "
                    f"best arm's {others[best]:.2f} ({', '.join(best)})"
                )
        if chain == "glue" and shapes == "static" and grid.GATE_COST_ROWS >= N:
            cost = results.gate_cost(key, ("gatefuse-auto", "default"))
            if cost is not None and cost > grid.GATE_COST_US:
                misses.append(f"{name_of(key)}: the gate costs {cost:.2f} us > {grid.GATE_COST_US}")
    misses += check_host(results.host)
    if not partial:
        misses += [f"{what}: not measured" for what in missing(results)]
    return misses


def check_host(rows: list[Row]) -> list[str]:
    misses: list[str] = []
    calls: dict[str, dict[str, float]] = {}
    for row in rows:
        if "error" in row:
            misses.append(f"host {row['chain']}: {row['arm']} failed: {row['error']}")
        elif row["what"] == "call":
            calls.setdefault(row["chain"], {})[row["arm"]] = row["median_us"]
        elif row["what"] == "import":
            if row["median_ms"] > grid.IMPORT_MS:
                misses.append(f"import: {row['median_ms']} ms > {grid.IMPORT_MS}")
            if row["initialises_cuda"]:
                misses.append("import: initialises CUDA")
    for chain, times in calls.items():
        ours, theirs = times.get("gatefuse-auto"), times.get("inductor")
        if ours is not None and theirs is not None and ours > theirs:
            misses.append(f"host {chain}: gatefuse {ours:.1f} us > Inductor {theirs:.1f}")
    return misses


def missing(results: Results) -> list[str]:
    """What a complete set of results has, and these have not."""
    lacking: list[str] = []
    for shapes in grid.SHAPES:
        for chain in grid.FAMILY:
            # Without a gate there is one control of gatefuse, and one mode if sizes are dynamic.
            modes = grid.MODES if shapes == "static" else grid.MODES[:1]
            arms = [("inductor", mode) for mode in modes]
            arms += [
                ("gatefuse-auto", m) for m in modes if chain != "glue_nogate" or m == "default"
            ]
            for H in grid.WIDTHS:
                for N in grid.ROWS if shapes == "static" else grid.ROWS[1:]:
                    key = (shapes, chain, H, N, grid.DTYPE)
                    measured = results.cells.get(key, {})
                    lacking += [
                        f"{name_of(key)}: {', '.join(a)}" for a in arms if a not in measured
                    ]
    for what in ("call", "import"):
        if not any(row["what"] == what for row in results.host):
            lacking.append(f"host: {what}")
    return lacking


def table(columns: list[str], rows: list[tuple[str, list[str]]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    lines += ["| " + " | ".join([label, *values]) + " |" for label, values in rows]
    return "\n".join(lines)


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def label_of(arm: ArmKey) -> str:
    return arm[0] if arm[1] == "-" else f"{arm[0]}, {arm[1]}"


def grid_tables(results: Results, shapes: str, chain: str, H: int, dtype: str) -> Iterable[str]:
    """Times, then gatefuse over Inductor in the same mode, then (glue) what the gate costs."""
    keys = sorted(k for k in results.cells if k[:3] == (shapes, chain, H) and k[4] == dtype)
    arms = list(dict.fromkeys(arm for key in keys for arm in results.cells[key]))
    title = f"{chain}, H = {H}" + (f", {shapes}" if shapes != "static" else "")
    title += f", {dtype}" if dtype != grid.DTYPE else ""

    def block(what: str, labels: list[tuple[str, Callable[[Key], str]]]) -> str:
        body = [(label, [cell(key) for key in keys]) for label, cell in labels]
        body = [(label, values) for label, values in body if any(values)]
        return f"### {title}: {what}\n\n" + table(["N", *(str(key[3]) for key in keys)], body)

    def time_cell(arm: ArmKey) -> Callable[[Key], str]:
        def cell(key: Key) -> str:
            row = results.cells[key].get(arm, {})
            return "failed" if "error" in row else number(row.get("median_us"))

        return cell

    def ratio_cell(mode: str) -> Callable[[Key], str]:
        def cell(key: Key) -> str:
            ours, theirs = (results.time(key, (a, mode)) for a in ("gatefuse-auto", "inductor"))
            return "" if ours is None or theirs is None else f"{ours / theirs:.3f}"

        return cell

    yield block("µs", [(label_of(arm), time_cell(arm)) for arm in arms])
    yield block("gatefuse / Inductor", [(mode, ratio_cell(mode)) for mode in grid.MODES])
    if chain == "glue":
        yield block(
            "cost of the gate, µs",
            [
                (label_of(arm), lambda key, arm=arm: number(results.gate_cost(key, arm)))
                for arm in arms
            ],
        )


def host_tables(rows: list[Row]) -> Iterable[str]:
    calls = [row for row in rows if row["what"] == "call"]
    if calls:
        chains = list(dict.fromkeys(row["chain"] for row in calls))
        times = {(row["chain"], row["arm"]): row.get("median_us") for row in calls}
        body = [
            (arm, [number(times.get((chain, arm))) for chain in chains])
            for arm in dict.fromkeys(row["arm"] for row in calls)
        ]
        yield (
            f"### host, N = {calls[0]['N']}, H = {calls[0]['H']}, no CUDA graphs: µs per call\n\n"
            + table(["arm", *chains], body)
        )
    compiles = [row for row in rows if row["what"] == "compile"]
    if compiles:
        body = [
            (f"{r['chain']}, {r['arm']}", [number(r["median_s"]), number(r["pass_ms"])])
            for r in compiles
        ]
        yield "### compile\n\n" + table(["chain, arm", "first call, s", "pass, ms"], body)
    for row in rows:
        if row["what"] == "import":
            yield (
                f"`import gatefuse` after `import torch`: {row['median_ms']} ms, "
                f"initialises CUDA: {row['initialises_cuda']}"
            )


def render(results: Results) -> str:
    """All tables, as Markdown."""
    parts = []
    for header in results.headers:
        shown = ("device", "torch", "triton", "gatefuse", "commit", "date")
        parts.append("; ".join(f"{name} {header.get(name)}" for name in shown))
    tables = dict.fromkeys((k[0], k[1], k[2], k[4]) for k in results.cells)
    for shapes in grid.SHAPES:
        for chain in grid.FAMILY:
            for key in sorted(t for t in tables if t[:2] == (shapes, chain)):
                parts += grid_tables(results, *key)
    return "\n\n".join([*parts, *host_tables(results.host)])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", type=Path, nargs="+", metavar="RESULTS.json")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--partial", action="store_true")
    args = parser.parse_args(arguments)
    results = collect(json.loads(path.read_text()) for path in args.files)
    print(render(results))
    if not args.check:
        return 0
    misses = check(results, args.partial)
    print("\n" + "\n".join(f"MISS {miss}" for miss in misses) if misses else "\nAll marks reached.")
    return 1 if misses else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
