"""Writes the tables of README.md from the committed results.

    python -m benchmarks.readme [--check]

With ``--check`` nothing is written; exits with 1 if the README differs from the results.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks import grid
from benchmarks.report import (
    LIMIT,
    ArmKey,
    Key,
    Results,
    check,
    collect,
    missing,
    number,
    table,
)
from benchmarks.results import ROOT

RESULTS = Path(__file__).with_name("results")
README = ROOT / "README.md"
BEGIN, END = "<!-- results -->", "<!-- /results -->"

GATEFUSE: ArmKey = ("gatefuse-auto", "default")
ARMS: dict[ArmKey, str] = {
    ("eager", "-"): "eager",
    ("inductor", "default"): "Inductor",
    ("inductor", "max-autotune"): "Inductor, max-autotune",
    ("inductor", "coordinate-descent"): "Inductor, coordinate descent",
    GATEFUSE: "**gatefuse**",
    LIMIT: "`torch.add` / `torch.addcmul`",
}
CHAINS = {
    "mul": "`sigmoid(x @ w.T) * v`",
    "add": "`routed + sigmoid(x @ w.T) * v`",
    "glue": "A decoder layer's glue: norm, router, gate, routed add, residual, next norm",
}


def load() -> Results:
    """All committed results, in the order of their dates."""
    files = [json.loads(path.read_text()) for path in RESULTS.glob("*.json")]
    kept = [f for f in files if f["kind"] in ("core", "host")]
    return collect(sorted(kept, key=lambda f: f["header"]["date"]))


def chain_tables(results: Results, H: int) -> list[str]:
    parts = []
    for chain, title in CHAINS.items():
        keys: list[Key] = sorted(
            k for k in results.cells if k[:3] == ("static", chain, H) and k[4] == grid.DTYPE
        )
        if not keys:
            continue
        body = [
            (label, [number(results.time(key, arm)) for key in keys]) for arm, label in ARMS.items()
        ]
        if chain == "glue":
            body += [
                (f"cost of the gate: {label}", [number(results.gate_cost(k, arm)) for k in keys])
                for arm, label in ((("inductor", "default"), "Inductor"), (GATEFUSE, "gatefuse"))
            ]
        body = [(label, values) for label, values in body if any(values)]
        parts.append(f"{title}, H = {H}, µs:")
        parts.append(table(["N", *(str(key[3]) for key in keys)], body))
    return parts


def host_table(results: Results) -> list[str]:
    calls = [r for r in results.host if r["what"] == "call"]
    if not calls:
        return []
    chains = list(dict.fromkeys(r["chain"] for r in calls))
    times = {(r["chain"], r["arm"]): r.get("median_us") for r in calls}
    shown = {"eager": "eager", "inductor": "Inductor", "gatefuse-auto": "**gatefuse**"}
    body = [
        (label, [number(times.get((chain, arm))) for chain in chains])
        for arm, label in shown.items()
    ]
    title = f"Host time per call without CUDA graphs, N = {calls[0]['N']}, H = {calls[0]['H']}, µs:"
    return [title, table(["", *chains], body)]


def section() -> str:
    """The part of the README between the markers."""
    results = load()
    header = results.headers[-1]
    where = (
        f"{header['device'].split(',')[0]}, torch {header['torch']}, Triton {header['triton']}, "
        f"{header['date'][:10]}; bfloat16, inputs colder than L2, medians of CUDA-graph replays. "
        "N is the number of tokens. gatefuse and Inductor run in their default mode unless another "
        f"is named; of the glue in a mode that tunes, the best of {grid.DRAWS} compiles counts. "
        "The cost of the gate is the time with it minus the time of "
        "the same module without; it is negative where gatefuse's kernels beat those that "
        "Inductor makes for the module without a gate. `python -m benchmarks.report "
        "benchmarks/results/*.json --check` prints every arm, the other width, and each cell "
        "that misses its mark."
    )
    parts = [where, *chain_tables(results, grid.WIDTHS[0]), *host_table(results)]
    return "\n\n".join([*parts, *marks(results)])


def marks(results: Results) -> list[str]:
    """What the results miss of the marks in :mod:`benchmarks.grid`."""
    misses = check(results, partial=True)
    parts = []
    if misses:
        parts.append("Marks that are missed:")
        parts.append("\n".join(f"- {miss}" for miss in misses))
    lacking = {what.split(":")[0] for what in missing(results)}
    symbolic = {cell for cell in lacking if cell.endswith(grid.SHAPES[1:])}
    fixed = sorted(lacking - symbolic)
    if fixed:
        parts.append(f"Not measured yet: {', '.join(fixed)}.")
    if symbolic:
        parts.append(f"Not measured yet, with symbolic sizes: {len(symbolic)} cells.")
    return parts


def main(arguments: list[str]) -> int:
    text = README.read_text()
    begin, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    new = f"{text[:begin]}\n{section()}\n{text[end:]}"
    if "--check" in arguments:
        return int(new != text)
    README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
