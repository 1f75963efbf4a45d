"""The thresholds that results must reach, which of them are violated, and what was not measured.

Times are in µs; a ratio is one of medians of one run.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import itertools
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from benchmarks import grid
from benchmarks.store import CASE, MODULE, ROOT, Results, numeric

# gatefuse over Inductor in the same mode, in every case; of the gate alone, in default mode, over
# the best provider of all as well. In the glue a loss to that one is listed from EXPLAINED on.
SLOWER, EXPLAINED = 1.02, 1.03
# The gate alone: Inductor's default mode over gatefuse. In the glue: the gate's cost under Inductor
# over that under gatefuse. Both up to so many rows.
SPEEDUP, GATE_COST_RATIO, SMALL_ROWS = 1.5, 5.0, 1024
# In the glue the gate costs at most so much at up to so many rows, and so much by width and rows.
GATE_COST_US, GATE_COST_ROWS = 0.5, 256
GATE_COST_PREFILL_US = {(2048, 8192): 2.0, (4096, 8192): 3.0}
# The kernel alone over torch.add or torch.addcmul, from SMALL_ROWS rows on.
ROOFLINE_RATIO = 1.05
# The eager op is at most so much slower than the best known kernel at up to so many rows: as
# peers.csv has it, and as measured beside it (the suite `sglang`).
BASELINE_US, BASELINE_ROWS = 0.1, 256
# Training: the gate alone over the least bytes at the roofline's rate, the glue over Inductor, both
# from so many rows on; memory at the peak over Inductor's.
TRAINING_RATIO, TRAINING_GLUE, TRAINING_ROWS, MEMORY = 1.10, 0.80, 4096, 1.01
# gatefuse's pass, of a compile in an empty cache; `import gatefuse` after `import torch`.
PASS_SHARE, IMPORT_MS = 0.01, 50.0


@dataclass(frozen=True)
class Threshold:
    """What of a frame's rows violates it, as pandas' ``query`` takes it, and the text, a format of
    the row ``r``. reported: such a violation is an error only without a known reason."""

    violated: str
    text: str
    reported: bool = False


@dataclass
class Violation:
    """``case`` violates a threshold with a provider in a mode; ``reason`` is known from
    ``benchmarks/reasons.toml`` or None."""

    case: str
    provider: str
    mode: str
    text: str
    reason: str | None = None
    reported: bool = False

    def __str__(self) -> str:
        return f"{self.case}: {self.text}"


FUSED = "provider == 'gatefuse-auto'"
GPU = "shapes == 'static' and device == 'cuda'"
DEFAULT = f"{FUSED} and mode == 'default' and {GPU}"
ALONE = "workload in ('mul', 'add')"
TRAINED = f"{DEFAULT} and workload in {grid.TRAINED} and N >= {TRAINING_ROWS}"
KERNEL = f"provider == 'op' and {ALONE} and {GPU}"

FAILED = Threshold("error.notna()", "{r.provider}, {r.mode} failed: {r.error}")
PASS = f"pass_ms > {PASS_SHARE} * compile_s * 1e3"
PASS_TEXT = "{r.what}: the pass takes {r.pass_ms:.1f} ms, {r.pass_percent:.2f} % of the compile"


def _slower(hot: str = "", what: str = "", digits: int = 2) -> Threshold:
    """Slower than Inductor. hot: what the names of the columns begin with."""
    return Threshold(
        f"{FUSED} and {hot}median_us > {SLOWER} * {hot}inductor_us",
        f"{{r.mode}}{what}: gatefuse {{r.{hot}median_us:.{digits}f}} us is {{r.{hot}ratio:.3f}} of "
        f"Inductor's {{r.{hot}inductor_us:.{digits}f}}",
    )


CASES = (
    FAILED,
    _slower(),
    _slower("hot_", ", hot"),
    Threshold(
        f"{DEFAULT} and {ALONE} and median_us > {SLOWER} * best_us",
        "gatefuse {r.median_us:.2f} us is {r.of_best:.3f} of the best provider's {r.best_us:.2f} "
        "({r.best})",
    ),
    Threshold(
        f"{DEFAULT} and {ALONE} and N <= {SMALL_ROWS} and median_us * {SPEEDUP} > inductor_us",
        "gatefuse {r.median_us:.2f} us is {r.speedup:.2f} times as fast as Inductor, "
        f"not {SPEEDUP}",
    ),
    Threshold(
        f"{KERNEL} and N >= {SMALL_ROWS} and median_us > {ROOFLINE_RATIO} * roofline_us",
        "the kernel takes {r.median_us:.2f} us, {r.of_least:.3f} of the roofline "
        "{r.roofline_us:.2f}",
    ),
    Threshold(
        f"{KERNEL} and N <= {BASELINE_ROWS} and median_us > baseline_us + {BASELINE_US}",
        "the kernel takes {r.median_us:.2f} us, the best known one {r.baseline_us:.2f}",
    ),
    Threshold(
        f"{DEFAULT} and N <= {SMALL_ROWS} and 0 < inductor_cost_us "
        f"and inductor_cost_us < {GATE_COST_RATIO} * cost_us",
        "the gate costs {r.cost_us:.2f} us, {r.cost_ratio:.1f} times less than under Inductor "
        f"({{r.inductor_cost_us:.2f}}), not {GATE_COST_RATIO:.0f}",
    ),
    Threshold(
        f"{DEFAULT} and cost_us > most_us and inductor_cost_us.notna()",
        "the gate costs {r.cost_us:.2f} us > {r.most_us}",
    ),
    Threshold(
        f"{TRAINED} and of_least > {TRAINING_RATIO}",
        "gatefuse {r.median_us:.1f} us is {r.of_least:.3f} of the least bytes' {r.least_us:.1f}",
    ),
    Threshold(
        f"{TRAINED} and workload == 'glue-training' and ratio > {TRAINING_GLUE}",
        f"gatefuse is {{r.ratio:.3f}} of Inductor's {{r.inductor_us:.1f}} us, not {TRAINING_GLUE}",
    ),
    Threshold(
        f"{FUSED} and more_memory > {MEMORY}",
        "{r.mode}: gatefuse takes {r.more_memory:.3f} of Inductor's memory at the peak",
    ),
    Threshold(
        f"{DEFAULT} and workload == 'glue' and median_us > {EXPLAINED} * best_us",
        "best provider {r.best} {r.best_us:.2f} us, gatefuse {r.median_us:.2f}",
        reported=True,
    ),
)
MODULES = (
    FAILED,
    _slower(digits=1),
    Threshold(
        f"{FUSED} and kernels > inductor_kernels",
        "{r.mode}: gatefuse launches {r.kernels:g} kernels, Inductor {r.inductor_kernels:g}",
    ),
    Threshold(f"{FUSED} and {PASS}", PASS_TEXT),
)
SGLANG = (
    Threshold(
        f"provider == 'op' and N <= {BASELINE_ROWS} and median_us > sglang_us + {BASELINE_US}",
        "side by side the op takes {r.median_us:.2f} us, the best known kernel {r.sglang_us:.2f}",
    ),
)
HOST = (
    Threshold("error.notna()", "{r.provider} failed: {r.error}"),
    Threshold(f"median_ms > {IMPORT_MS}", f"{{r.median_ms}} ms > {IMPORT_MS}"),
    Threshold("initialises_cuda == True", "initialises CUDA"),
    Threshold(PASS, PASS_TEXT),
    Threshold(
        f"{FUSED} and median_us > inductor_us",
        "{r.mode}: gatefuse {r.median_us:.1f} us > Inductor {r.inductor_us:.1f}",
    ),
)


@functools.cache
def reasons() -> list[tuple[list[str], str]]:
    """Patterns of violations, as a shell's, and why they are."""
    entries = tomllib.loads((ROOT / "benchmarks" / "reasons.toml").read_text())["reasons"]
    return [(entry["violations"], " ".join(entry["reason"].split())) for entry in entries]


def violations(results: Results) -> list[Violation]:
    """All of them, by case, with the first reason whose pattern fits the line."""
    found = [
        *_in_frame(_cases(results.cases), CASES),
        *_in_frame(_sglang(results.sglang), SGLANG),
        *_in_frame(modules_beside_inductor(results.modules), MODULES),
        *_in_frame(_host(results.host), HOST),
    ]
    for violation in found:
        fits = functools.partial(fnmatch.fnmatchcase, str(violation))
        violation.reason = next((text for of, text in reasons() if any(map(fits, of))), None)
    return found


def check(results: Results, partial: bool = False) -> list[Violation]:
    """Every violation that is an error. What was not measured is one too, unless ``partial``."""
    found = [v for v in violations(results) if not (v.reported and v.reason)]
    lacking = [] if partial else missing(results)
    return found + [Violation(case, "", "", f"not measured{what}") for case, what in lacking]


def _in_frame(frame: pd.DataFrame, thresholds: Iterable[Threshold]) -> list[Violation]:
    frame = numeric(frame)
    found = [
        Violation(row.case, row.provider, row.mode, t.text.format(r=row), reported=t.reported)
        for t in thresholds
        for row in frame.query(t.violated, engine="python").itertuples()
    ]
    order = {case: i for i, case in enumerate(frame["case"].unique())}
    return sorted(found, key=lambda violation: order[violation.case])


# Each frame with what its thresholds need beside the measured.


def _cases(cases: pd.DataFrame) -> pd.DataFrame:
    most = [
        GATE_COST_PREFILL_US.get((H, N), GATE_COST_US if N <= GATE_COST_ROWS else None)
        for H, N in zip(cases["H"], cases["N"])
    ]
    return cases.assign(
        most_us=pd.Series(most, cases.index, dtype=float).where(cases["dtype"] == grid.DTYPE),
        hot_ratio=cases["hot_median_us"] / cases["hot_inductor_us"],
        of_best=cases["median_us"] / cases["best_us"],
        speedup=cases["inductor_us"] / cases["median_us"],
        of_least=cases["median_us"] / cases["least_us"],
        cost_ratio=cases["inductor_cost_us"] / cases["cost_us"],
    )


def _sglang(rows: pd.DataFrame) -> pd.DataFrame:
    rows = rows.sort_values(["workload", "H", "N"], kind="stable")
    rows["case"] = [f"{r.workload} H={r.H} N={r.N}" for r in rows.itertuples()]
    theirs = rows[rows["provider"] == "sglang"].set_index("case")["median_us"]
    return rows.assign(sglang_us=rows["case"].map(theirs), mode="beside sglang")


def modules_beside_inductor(modules: pd.DataFrame) -> pd.DataFrame:
    """The rows with the time and kernels of Inductor in the same mode."""
    columns = dict.fromkeys([*modules.columns, "kernels", "pass_ms", "compile_s"])
    modules = modules.reindex(columns=list(columns))
    of = [*MODULE, "mode"]
    inductor = modules[modules["provider"] == "inductor"][[*of, "median_us", "kernels"]]
    inductor = inductor.rename(columns={"median_us": "inductor_us", "kernels": "inductor_kernels"})
    modules = modules.merge(inductor, on=of, how="left").sort_values(MODULE, kind="stable")
    return modules.assign(
        case=[f"{r.model} {r.part} N={r.tokens}" for r in modules.itertuples()],
        what=modules["mode"],
        ratio=modules["median_us"] / modules["inductor_us"],
        pass_percent=modules["pass_ms"] / modules["compile_s"] / 10,
    )


def _host(rows: list[dict[str, Any]]) -> pd.DataFrame:
    columns = ["what", "workload", "provider", "mode", "cache", "error", "initialises_cuda"]
    columns += ["median_us", "median_ms", "median_s", "pass_ms"]
    frame = numeric(pd.DataFrame(rows).reindex(columns=columns))
    case = {"call": "host {}", "compile": "compile {}", "import": "import"}
    frame["case"] = [case[r.what].format(r.workload) for r in frame.itertuples()]
    is_import, is_compile = (frame["what"] == what for what in ("import", "compile"))
    frame.loc[is_import, ["provider", "mode"]] = ["gatefuse-auto", "default"]
    inductor = frame[(frame["provider"] == "inductor") & (frame["what"] == "call")]
    theirs = dict(zip(zip(inductor["workload"], inductor["mode"]), inductor["median_us"]))
    return frame.assign(
        inductor_us=[theirs.get(key) for key in zip(frame["workload"], frame["mode"])],
        compile_s=frame["median_s"],
        what=frame["cache"].where(is_compile, frame["what"]),
        pass_percent=frame["pass_ms"] / frame["median_s"] / 10,
    )


def missing_of(results: Results, cases: Iterable[grid.Case]) -> list[tuple[str, str]]:
    """The cases that lack providers, and a text that names those, empty if all lack."""
    found = results.cases
    keys = found[[*CASE, "provider", "mode"]].itertuples(index=False, name=None)
    measured = dict(zip(keys, found["error"].notna() | found["hot_median_us"].notna()))
    lacking: dict[grid.Key, list[str]] = {}
    for key, p in grid.measured(cases):
        hot = measured.get((*key, p.name, p.mode))
        if not p.draw and (hot is None or (grid.is_hot(key) and not hot)):
            text = f"{p.name}, {p.mode}" + (", hot" if hot is not None else "")
            lacking.setdefault(key, []).append(text)
    some = set(found["case"])
    return [(str(k), f": {'; '.join(of)}" if str(k) in some else "") for k, of in lacking.items()]


def missing(results: Results) -> list[tuple[str, str]]:
    """What the committed results should cover and do not."""
    lacking = [part for one in grid.GRIDS.values() for part in missing_of(results, one.cases())]
    columns = results.modules[[*MODULE, "mode", "provider"]]
    measured = set(columns.itertuples(index=False, name=None))
    for case, provider in itertools.product(grid.module_cases(), grid.MODULE_PROVIDERS):
        if (*dataclasses.astuple(case), provider) not in measured:
            name = f"{case.model} {case.part} N={case.tokens}"
            lacking.append((name, f": {provider}, {case.mode}"))
    host = {(row["what"], row.get("cache", "")) for row in results.host}
    for what in (("call", ""), ("import", ""), ("compile", "cold"), ("compile", "warm")):
        if what not in host:
            lacking.append(("host", ": " + " ".join(what).strip()))
    return lacking
