"""Which results miss a mark of :mod:`benchmarks.grid`, and what was not measured."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from benchmarks import grid
from benchmarks.grid import BlockKey, Key
from benchmarks.store import (
    GATEFUSE,
    INDUCTOR,
    LIMIT,
    OP,
    ROOT,
    ArmKey,
    Results,
    peers,
)


@dataclass(frozen=True)
class Miss:
    """``cell`` misses a mark with its arm ``arm``; ``reason`` is known from
    ``benchmarks/reasons.toml`` or None."""

    cell: Key | BlockKey | str
    arm: ArmKey
    text: str
    reason: str | None = None

    def __str__(self) -> str:
        return f"{self.cell}: {self.text}"


@functools.cache
def reasons() -> list[tuple[list[str], str]]:
    """Patterns of misses, as a shell's, and why they miss."""
    path = ROOT / "benchmarks" / "reasons.toml"
    if not path.exists():
        return []
    entries = tomllib.loads(path.read_text())["reasons"]
    return [(entry["misses"], " ".join(entry["reason"].split())) for entry in entries]


def with_reason(miss: Miss) -> Miss:
    """``miss`` with the first reason whose pattern fits its line."""
    for patterns, reason in reasons():
        if any(fnmatch.fnmatchcase(str(miss), pattern) for pattern in patterns):
            return dataclasses.replace(miss, reason=reason)
    return miss


def check(results: Results, partial: bool = False) -> list[Miss]:
    """Every mark that is missed, by cell. What was not measured is a miss too, unless
    ``partial``; a loss to the best arm in the glue is one unless its reason is known."""
    misses = [*_chains(results), *_rivals(results), *_blocks(results), *_host(results)]
    misses = [with_reason(miss) for miss in misses]
    misses += [loss for loss in losses(results) if loss.reason is None]
    if not partial:
        misses += [Miss(cell, ("", ""), f"not measured{arms}") for cell, arms in missing(results)]
    return misses


def _chains(results: Results) -> Iterator[Miss]:
    for key, arms in sorted(results.cells.items()):
        for arm, row in arms.items():
            if "error" in row:
                yield Miss(key, arm, f"{', '.join(arm)} failed: {row['error']}")
        for mode in grid.MODES:
            for column, what in (("median_us", mode), ("hot_median_us", f"{mode}, hot")):
                yield from _slower(results, key, mode, column, what)
        if key.device == "gpu" and key.shapes == "static":
            yield from _alone(results, key) if key.chain in ("mul", "add") else ()
            yield from _gate_cost(results, key)


def _slower(results: Results, key: Key, mode: str, column: str, what: str) -> Iterator[Miss]:
    arm = ("gatefuse-auto", mode)
    ours, theirs = (results.time(key, a, column) for a in (arm, ("inductor", mode)))
    if ours is not None and theirs is not None and ours > grid.SLOWER * theirs:
        yield Miss(
            key,
            arm,
            f"{what}: gatefuse {ours:.2f} us is {ours / theirs:.3f} of Inductor's {theirs:.2f}",
        )


def _alone(results: Results, key: Key) -> Iterator[Miss]:
    ours, best = results.time(key, GATEFUSE), results.best_arm(key)
    inductor, op, limit = (results.time(key, arm) for arm in (INDUCTOR, OP, LIMIT))
    if ours is not None and best is not None and ours > grid.SLOWER * best[1]:
        yield Miss(
            key,
            GATEFUSE,
            f"gatefuse {ours:.2f} us is {ours / best[1]:.3f} of the best arm's {best[1]:.2f} "
            f"({', '.join(best[0])})",
        )
    small = key.N <= grid.SMALL_ROWS
    if small and ours is not None and inductor is not None and ours * grid.SPEEDUP > inductor:
        yield Miss(
            key,
            GATEFUSE,
            f"gatefuse {ours:.2f} us is {inductor / ours:.2f} times as fast as Inductor, "
            f"not {grid.SPEEDUP}",
        )
    large = key.N >= grid.SMALL_ROWS
    if large and op is not None and limit is not None and op > grid.LIMIT_RATIO * limit:
        text = f"the kernel takes {op:.2f} us, {op / limit:.3f} of the limit {limit:.2f}"
        yield Miss(key, OP, text)
    peer = peers().get((key.chain, key.H, key.N)) if key.dtype == grid.DTYPE else None
    if op is not None and peer is not None and key.N <= grid.PEER_ROWS and op > peer + grid.PEER_US:
        yield Miss(key, OP, f"the kernel takes {op:.2f} us, the best known one {peer:.2f}")


def _gate_cost(results: Results, key: Key) -> Iterator[Miss]:
    ours, theirs = (results.gate_cost(key, arm) for arm in (GATEFUSE, INDUCTOR))
    if ours is None or theirs is None:
        return
    if key.N <= grid.SMALL_ROWS and 0 < theirs < grid.GATE_COST_RATIO * ours:
        yield Miss(
            key,
            GATEFUSE,
            f"the gate costs {ours:.2f} us, {theirs / ours:.1f} times less than under Inductor "
            f"({theirs:.2f}), not {grid.GATE_COST_RATIO:.0f}",
        )
    limit = grid.GATE_COST_US if key.N <= grid.GATE_COST_ROWS else None
    limit = grid.GATE_COST_PREFILL_US.get((key.H, key.N), limit)
    if limit is not None and key.dtype == grid.DTYPE and ours > limit:
        yield Miss(key, GATEFUSE, f"the gate costs {ours:.2f} us > {limit}")


def losses(results: Results) -> list[Miss]:
    """Where, in the glue, default-mode gatefuse is not the best of all arms, with the reasons."""
    found = []
    for key in sorted(results.cells):
        if (key.device, key.shapes, key.chain) != ("gpu", "static", "glue"):
            continue
        ours, best = results.time(key, GATEFUSE), results.best_arm(key)
        if ours is not None and best is not None and ours > grid.EXPLAINED * best[1]:
            text = f"best arm {', '.join(best[0])} {best[1]:.2f} us, gatefuse {ours:.2f}"
            found.append(with_reason(Miss(key, GATEFUSE, text)))
    return found


def _rivals(results: Results) -> Iterator[Miss]:
    for (chain, H, N), arms in sorted(results.rivals.items()):
        ours, theirs = (arms.get(arm, {}).get("median_us") for arm in ("op", "peer"))
        if ours is None or theirs is None or N > grid.PEER_ROWS or ours <= theirs + grid.PEER_US:
            continue
        text = f"side by side the op takes {ours:.2f} us, the best known kernel {theirs:.2f}"
        yield Miss(f"{chain} H={H} N={N}", OP, text)


def _blocks(results: Results) -> Iterator[Miss]:
    for key, arms in sorted(results.blocks.items()):
        for arm, row in arms.items():
            if "error" in row:
                yield Miss(key, arm, f"{', '.join(arm)} failed: {row['error']}")
        for mode in grid.BLOCK_MODES:
            arm = ("gatefuse-auto", mode)
            ours, theirs = arms.get(arm, {}), arms.get(("inductor", mode), {})
            if "median_us" not in ours or "median_us" not in theirs:
                continue
            if ours["median_us"] > grid.SLOWER * theirs["median_us"]:
                ratio = ours["median_us"] / theirs["median_us"]
                yield Miss(
                    key,
                    arm,
                    f"{mode}: gatefuse {ours['median_us']:.1f} us is {ratio:.3f} of Inductor's "
                    f"{theirs['median_us']:.1f}",
                )
            if ours["kernels"] > theirs["kernels"]:
                yield Miss(
                    key,
                    arm,
                    f"{mode}: gatefuse launches {ours['kernels']} kernels, "
                    f"Inductor {theirs['kernels']}",
                )
            if ours["pass_ms"] > grid.PASS_SHARE * ours["compile_s"] * 1e3:
                yield _pass_miss(key, arm, mode, ours["pass_ms"], ours["compile_s"])


def _pass_miss(
    cell: BlockKey | str, arm: ArmKey, what: str, pass_ms: float, compile_s: float
) -> Miss:
    return Miss(
        cell,
        arm,
        f"{what}: the pass takes {pass_ms:.1f} ms, {pass_ms / compile_s / 10:.2f} % of the compile",
    )


def _host(results: Results) -> Iterator[Miss]:
    calls: dict[tuple[str, str], dict[str, float]] = {}
    for row in results.host:
        if "error" in row:
            text = f"{row['arm']} failed: {row['error']}"
            yield Miss(f"host {row['chain']}", (row["arm"], row["mode"]), text)
        elif row["what"] == "call":
            calls.setdefault((row["chain"], row["mode"]), {})[row["arm"]] = row["median_us"]
        elif row["what"] == "import":
            if row["median_ms"] > grid.IMPORT_MS:
                yield Miss("import", GATEFUSE, f"{row['median_ms']} ms > {grid.IMPORT_MS}")
            if row["initialises_cuda"]:
                yield Miss("import", GATEFUSE, "initialises CUDA")
        elif row["pass_ms"] > grid.PASS_SHARE * row["median_s"] * 1e3:
            name = f"compile {row['chain']}"
            yield _pass_miss(name, GATEFUSE, row["cache"], row["pass_ms"], row["median_s"])
    for (chain, mode), times in calls.items():
        if "inductor" in times and times.get("gatefuse-auto", 0.0) > times["inductor"]:
            yield Miss(
                f"host {chain}",
                ("gatefuse-auto", mode),
                f"{mode}: gatefuse {times['gatefuse-auto']:.1f} us > "
                f"Inductor {times['inductor']:.1f}",
            )


def missing_of(results: Results, cells: Iterable[grid.Cell]) -> list[tuple[Key, str]]:
    """The keys of ``cells`` that lack arms, and a text that names those, empty if all lack."""
    lacking: dict[Key, list[str]] = {}
    for cell in cells:
        for key, arm in cell.measured():
            if arm.draw:
                continue
            row = results.cells.get(key, {}).get((arm.name, arm.mode))
            if row is None:
                lacking.setdefault(key, []).append(f"{arm.name}, {arm.mode}")
            elif cell.hot and "hot_median_us" not in row and "error" not in row:
                lacking.setdefault(key, []).append(f"{arm.name}, {arm.mode}, hot")
    return [
        (key, f": {'; '.join(arms)}" if key in results.cells else "")
        for key, arms in lacking.items()
    ]


def missing(results: Results) -> list[tuple[Key | BlockKey | str, str]]:
    """What the committed results should hold and do not."""
    lacking: list[tuple[Key | BlockKey | str, str]] = []
    for one in (*grid.GRIDS.values(), grid.CPU_GRID):
        lacking += missing_of(results, one.cells())
    for cell in grid.block_cells():
        for arm in ("inductor", "gatefuse-auto"):
            if (arm, cell.mode) not in results.blocks.get(cell.key, {}):
                lacking.append((cell.key, f": {arm}, {cell.mode}"))
    host = {(row["what"], row.get("cache", "")) for row in results.host}
    for what in (("call", ""), ("import", ""), ("compile", "cold"), ("compile", "warm")):
        if what not in host:
            lacking.append(("host", ": " + " ".join(what).strip()))
    return lacking
