"""Writes the tables of README.md and docs/ from the committed results.

A document has places ``<!-- results: NAME -->`` ... ``<!-- /results -->``, each filled by the
function of that name here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks import grid
from benchmarks import store as results
from benchmarks.store import EAGER, GATEFUSE, INDUCTOR, LIMIT, ArmKey
from benchmarks.tables import ARMS, CHAINS, Shown, Tables, provenance
from benchmarks.thresholds import Miss, losses, missing, missing_of
from benchmarks.vllm import tables as vllm_tables

DOCUMENTS = ("README.md", "docs/performance.md", "docs/vllm.md")
_PLACE = re.compile(r"(<!-- results: (?P<name>[\w-]+) -->\n).*?(<!-- /results -->)", re.DOTALL)


def update(root: Path) -> None:
    """Fill every place of every document below ``root``."""
    for path, text in rendered(root).items():
        path.write_text(text)


def rendered(root: Path) -> dict[Path, str]:
    """The documents as they should be."""
    tables = Tables(results.committed())

    def fill(place: re.Match[str]) -> str:
        parts = [part for part in SECTIONS[place["name"]](tables) if part]
        text = "\n\n".join(parts) or "Not measured yet."
        return f"{place[1]}\n{text}\n\n{place[3]}"

    return {
        path: _PLACE.sub(fill, path.read_text())
        for path in (root / name for name in DOCUMENTS)
        if path.exists()
    }


def measured_on(tables: Tables, *kinds: str) -> str:
    """Devices, versions and dates of the results of the kinds."""
    lines = [provenance(h) for kind in kinds for h in tables.results.headers.get(kind, [])]
    return "; ".join(dict.fromkeys(lines)) + "." if lines else ""


README_ARMS: tuple[ArmKey, ...] = (
    ("eager", "-"),
    INDUCTOR,
    ("inductor", "max-autotune"),
    ("inductor", "coordinate-descent"),
    GATEFUSE,
    LIMIT,
)


def summary(tables: Tables) -> list[str]:
    """Of README.md: one width, the arms a user would choose from."""
    parts = [measured_on(tables, "core")]
    for chain in grid.MAIN:
        keys = tables.keys(chain, grid.WIDTHS[0])
        if not keys:
            continue
        lines: list[Shown] = [(ARMS[arm], tables.time(arm)) for arm in README_ARMS]
        if chain == "glue":
            lines += [
                (f"cost of the gate: {ARMS[arm]}", tables.cost(arm)) for arm in (INDUCTOR, GATEFUSE)
            ]
        parts += [f"{CHAINS[chain]}, H = {grid.WIDTHS[0]}, µs:", tables.by_rows(keys, lines)]
    return [*parts, *tables.host_calls((EAGER, INDUCTOR, GATEFUSE)), counts(tables)]


def counts(tables: Tables) -> str:
    """How many marks are missed."""
    found = tables.results
    modules = {(key, mode) for key, arms in found.blocks.items() for _, mode in arms}
    measured = len(found.cells) + len(modules)
    text = f"{len(tables.misses)} marks are missed (†) in {measured} measured cells"
    if lacking := len(missing(found)):
        text += f", and {lacking} are not measured yet"
    return f"{text}: [why](docs/performance.md#what-misses-its-mark-and-why)."


def misses(tables: Tables) -> list[str]:
    """Every miss, by its reason."""
    return _by_reason(miss for miss in tables.misses if miss not in losses(tables.results))


def lost(tables: Tables) -> list[str]:
    """Where another arm is faster in the glue, by its reason."""
    return _by_reason(losses(tables.results))


def _by_reason(found: Iterable[Miss]) -> list[str]:
    lines: dict[str, list[str]] = {}
    for miss in found:
        lines.setdefault(miss.reason or "Not explained yet.", []).append(f"- {miss}")
    parts = [part for reason in lines for part in ("\n".join(lines[reason]), f"*{reason}*")]
    return parts or ["None."]


def unmeasured(tables: Tables) -> list[str]:
    """What the committed results lack, by part."""
    lines = []
    parts = {**grid.GRIDS, "cpu": grid.CPU_GRID}
    for name, one in parts.items():
        cells = one.cells()
        total = len({key for cell in cells for key, _ in cell.measured()})
        lacking = missing_of(tables.results, cells)
        whole = sum(not arms for _, arms in lacking)
        if whole:
            lines.append(f"- {name}: {whole} of {total} chains and sizes")
        if len(lacking) > whole:
            lines.append(f"- {name}: arms or hot inputs of {len(lacking) - whole} chains and sizes")
    total = len(grid.block_cells())
    lacking_blocks = sum(
        ("gatefuse-auto", cell.mode) not in tables.results.blocks.get(cell.key, {})
        for cell in grid.block_cells()
    )
    if lacking_blocks:
        lines.append(f"- blocks: {lacking_blocks} of {total} modules, sizes and modes")
    lines += [f"- {cell}{what}" for cell, what in missing(tables.results) if cell == "host"]
    return ["\n".join(lines) or "Nothing."]


def main_tables(tables: Tables) -> list[str]:
    """Every arm at both widths, with the spread."""
    parts = [measured_on(tables, "core")]
    for chain in grid.MAIN:
        for H in grid.WIDTHS:
            parts += tables.times(chain, H, spread=True)
    return parts


def alone(tables: Tables) -> list[str]:
    """Hot inputs, bandwidth, the best known kernel."""
    return [part for c in ("mul", "add") for H in grid.WIDTHS for part in tables.alone(c, H)]


def peer(tables: Tables) -> list[str]:
    """The op beside the best known kernel."""
    return [measured_on(tables, "peer"), *tables.beside_peer()]


def gate_cost(tables: Tables) -> list[str]:
    """Of the main chain, all arms."""
    return [part for H in grid.WIDTHS for part in tables.gate_costs("glue", H)]


def variants(tables: Tables) -> list[str]:
    """Cost of the gate with other neighbours."""
    return [p for c in grid.VARIANTS for H in grid.WIDTHS for p in tables.gate_costs(c, H)]


def _ratios(tables: Tables, **where: str) -> list[str]:
    parts = []
    for chain in grid.MAIN:
        body = tables.by_width(chain, tables.ratio(GATEFUSE, INDUCTOR), **where)
        parts += [f"{CHAINS[chain]}:", body] if body else []
    return parts


def widths(tables: Tables) -> list[str]:
    """All widths."""
    return _ratios(tables)


def dtypes(tables: Tables) -> list[str]:
    """float16 and float32."""
    parts = []
    for dtype in grid.GRIDS["dtypes"].dtypes:
        found = _ratios(tables, dtype=dtype)
        parts += [f"{dtype}:", *found] if found else []
    return parts


def dynamic(tables: Tables) -> list[str]:
    """Symbolic rows, and symbolic rows and width."""
    parts = []
    what = {"dynamic-rows": "Symbolic rows:", "dynamic": "Symbolic rows and width:"}
    for shapes, title in what.items():
        found = _ratios(tables, shapes=shapes)
        parts += [title, *found] if found else []
    return parts


def blocks(tables: Tables) -> list[str]:
    """Modules of transformers."""
    return [measured_on(tables, "blocks"), *tables.blocks()]


def host(tables: Tables) -> list[str]:
    """Host time, compile time, import."""
    return [measured_on(tables, "host"), *tables.host_calls(), *tables.compiles()]


def cpu(tables: Tables) -> list[str]:
    """The CPU."""
    return [measured_on(tables, "cpu"), *tables.cpu()]


def engines(tables: Tables) -> list[str]:
    """vLLM."""
    parts = []
    for content in tables.results.engines:
        what = f"**{vllm_tables.title(content)}** ({provenance(content['header'])})"
        parts += [what, *vllm_tables.tables(content)]
    return parts


SECTIONS: dict[str, Callable[[Tables], list[str]]] = {
    "summary": summary,
    "misses": misses,
    "losses": lost,
    "unmeasured": unmeasured,
    "main": main_tables,
    "alone": alone,
    "peer": peer,
    "gate-cost": gate_cost,
    "variants": variants,
    "widths": widths,
    "dtypes": dtypes,
    "dynamic": dynamic,
    "blocks": blocks,
    "host": host,
    "cpu": cpu,
    "engines": engines,
}
