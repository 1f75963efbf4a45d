"""Writes ``benchmarks/RESULTS.md``, the summary in README.md and the plots from results."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import pandas as pd

from benchmarks import grid, store
from benchmarks.grid import WORKLOADS
from benchmarks.store import CASE, ROOT, Results
from benchmarks.tables import GATEFUSE, INDUCTOR, Tables, markdown, provenance, select
from benchmarks.thresholds import Violation, missing
from benchmarks.vllm import tables as vllm_tables

README_PLACE = re.compile(r"(<!-- results: summary -->\n).*?(<!-- /results -->)", re.DOTALL)

HEAD = """# Results

Written by `python -m benchmarks publish` from the committed files in [results](results). How they
are measured and what they say: [docs/performance.md](../docs/performance.md), for engines of vLLM
[docs/vllm.md](../docs/vllm.md).

N is the number of tokens, H the width; times are medians, with the 10th and the 90th percentile in
parentheses. A number with † violates a threshold of [thresholds.py](thresholds.py). With ‡ gatefuse
left the gate alone there, because fusing it does not pay.
"""


def report(results: Results) -> str:
    tables, parts = Tables(results), []
    for title, section in SECTIONS.items():
        if found := [part for part in section(tables) if part]:
            parts += [f"## {title}", *found]
    return "\n\n".join(parts) + "\n"


def published() -> dict[Path, str]:
    """The generated documents as they should be."""
    results = store.committed()
    readme = ROOT / "README.md"
    text = "\n\n".join(summary(Tables(results)))
    return {
        ROOT / "benchmarks" / "RESULTS.md": f"{HEAD}\n{report(results)}",
        readme: README_PLACE.sub(lambda m: f"{m[1]}\n{text}\n\n{m[2]}", readme.read_text()),
    }


def measured_on(tables: Tables, *kinds: str) -> str:
    """Devices, versions and dates of the results of the kinds."""
    dates: dict[str, dict[str, None]] = {}
    for header in (h for kind in kinds for h in tables.results.headers.get(kind, [])):
        what, date = provenance(header).rsplit(", ", 1)
        dates.setdefault(what, {})[date] = None
    return "; ".join(f"{w}, {' and '.join(of)}" for w, of in dates.items()) + "." * bool(dates)


def summary(tables: Tables) -> list[str]:
    """Of README.md: one width, gatefuse and Inductor in their default mode."""
    pair, H = (INDUCTOR, GATEFUSE), grid.WIDTHS[0]
    rows = {
        "the gate alone": tables.lines(select(tables.cases, "mul", H), "time", pair),
        "in a layer's glue": tables.lines(select(tables.cases, "glue", H), "time", pair),
        "cost of the gate there": tables.lines(select(tables.cases, "glue", H), "cost", pair),
    }
    table = pd.concat([t.rename(lambda p, w=w: f"{w}: {p}") for w, t in rows.items()])
    found = tables.results
    modules = found.modules.drop_duplicates(["model", "part", "tokens", "mode"])
    measured = len(found.cases.drop_duplicates(CASE)) + len(modules)
    violated = sum(not (v.reported and v.reason) for v in tables.violations)
    text = f"{violated} thresholds are violated (†) in {measured} measured cases"
    if lacking := len(missing(found)):
        text += f", and {lacking} are not measured yet"
    return [
        f"µs, H = {H}; {measured_on(tables, 'workloads')}",
        markdown(table),
        f"{text}: [all tables, and why](benchmarks/RESULTS.md#violated-thresholds).",
    ]


def violated(tables: Tables) -> list[str]:
    return _by_reason(v for v in tables.violations if not v.reported)


def slower_than_another(tables: Tables) -> list[str]:
    """Where another provider is faster in the glue, by its reason."""
    found = [v for v in tables.violations if v.reported]
    intro = "gatefuse in Inductor's default mode against the best of all providers, tuned ones too:"
    return [intro, *_by_reason(found)] if found else []


def _by_reason(found: Iterable[Violation]) -> list[str]:
    lines: dict[str, list[str]] = {}
    for violation in found:
        lines.setdefault(violation.reason or "Not explained yet.", []).append(f"- {violation}")
    return [part for reason in lines for part in ("\n".join(lines[reason]), f"*{reason}*")]


def unmeasured(tables: Tables) -> list[str]:
    if not tables.results.headers.keys() >= {"workloads", "cpu", "modules", "host"}:
        return []  # of a part no more is expected
    return ["\n".join(f"- {case}{what}" for case, what in missing(tables.results)) or "Nothing."]


Section = Callable[[Tables], list[str]]


def _each(table: Callable[[Tables, str, int], list[str]], workloads: Iterable[str]) -> Section:
    return lambda tables: [p for w in workloads for H in tables.widths for p in table(tables, w, H)]


def ratios(name: str, values: dict[str, str], of: Iterable[str] = WORKLOADS) -> Section:
    """gatefuse over Inductor for each value of a column, with its title."""

    def section(tables: Tables) -> list[str]:
        parts = []
        for value, title in values.items():
            found = [p for w in of for p in tables.ratios(w, **{name: value})]
            parts += [title, *found] if found else []
        return parts

    return section


def _on(kind: str, section: Section) -> Section:
    """A section that begins with what it was measured on."""

    def with_header(tables: Tables) -> list[str]:
        found = section(tables)
        return [measured_on(tables, kind), *found] if found else []

    return with_header


def engines(tables: Tables) -> list[str]:
    parts = []
    for content in tables.results.engines:
        what = f"**{vllm_tables.title(content)}** ({provenance(content['header'])})"
        parts += [what, *vllm_tables.tables(content)]
    return parts


SECTIONS: dict[str, Section] = {
    "Violated thresholds": violated,
    "Slower than another provider in the glue": slower_than_another,
    "Every provider": _on("workloads", _each(Tables.times, WORKLOADS)),
    "The gate alone": _each(Tables.alone, ("mul", "add")),
    "Beside the best known kernel": _on("sglang", Tables.beside_sglang),
    "What the gate costs in a layer's glue": _each(Tables.gate_costs, ["glue"]),
    "With other neighbours": _each(Tables.gate_costs, grid.VARIANTS),
    "Other widths: gatefuse over Inductor": ratios("dtype", {grid.DTYPE: ""}),
    "Other dtypes: gatefuse over Inductor": ratios(
        "dtype", {dtype: f"{dtype}:" for dtype in grid.GRIDS["dtypes"].dtypes}
    ),
    "Symbolic sizes: gatefuse over Inductor": ratios(
        "shapes", {"dynamic-rows": "Symbolic rows:", "dynamic": "Symbolic rows and width:"}
    ),
    "Training: gatefuse over Inductor (the limit over gatefuse)": ratios(
        "mode", {mode: f"Mode {mode}:" for mode in grid.MODES[:2]}, grid.TRAINED
    ),
    "Modules of transformers": _on("modules", Tables.modules),
    "Host and compile time": _on("host", lambda t: [*t.host_calls(), *t.compiles()]),
    "CPU": _on("cpu", Tables.cpu),
    "Engines of vLLM": engines,
    "Not measured yet": unmeasured,
}
