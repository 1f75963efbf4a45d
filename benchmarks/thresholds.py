"""The thresholds that results must reach, which of them are violated, and what was not measured.

Times are in µs; a ratio is one of medians of one run.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import tomllib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd

from benchmarks import grid
from benchmarks.store import CASE, MODULE, ROOT, Results, case_name, numeric

SLOWER = 1.02
"""gatefuse over Inductor alone in the same mode, in every case, and, of the gate alone in default
mode, over the best provider of all."""

EXPLAINED = 1.03
"""In the glue, default-mode gatefuse over the best provider of all: above this it is listed."""

SMALL_ROWS = 1024
SPEEDUP = 1.5
"""Of the gate alone: Inductor's default mode over gatefuse, up to SMALL_ROWS rows."""

GATE_COST_RATIO = 5.0
"""In the glue: cost of the gate under Inductor's default mode over that under gatefuse, up to
SMALL_ROWS rows."""

GATE_COST_US = 0.5
GATE_COST_ROWS = 256
"""In the glue the gate costs at most so much at up to so many rows."""

GATE_COST_PREFILL_US = {(2048, 8192): 2.0, (4096, 8192): 3.0}
"""The same by width and rows."""

ROOFLINE_RATIO = 1.05
"""The kernel alone over ``torch.add`` or ``torch.addcmul``, from SMALL_ROWS rows on."""

BASELINE_ROWS = 256
BASELINE_US = 0.1
"""The eager op is at most so much slower than the best known kernel, up to BASELINE_ROWS rows: as
``benchmarks/peers.csv`` has it, and as measured beside it (the suite ``sglang``)."""

PASS_SHARE = 0.01
"""gatefuse's pass, of the time of a compile in an empty cache."""

IMPORT_MS = 50.0
"""``import gatefuse`` after ``import torch``."""


@dataclass(frozen=True)
class Threshold:
    """What of a frame's rows violates it, as pandas' ``query`` takes it, and the text for such a
    row; ``reported`` if only one without a known reason is an error."""

    violated: str
    text: Callable[[Any], str]
    reported: bool = False


@dataclass(frozen=True)
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


FAILED = Threshold("error.notna()", lambda r: f"{r.provider}, {r.mode} failed: {r.error}")
FUSED = "provider == 'gatefuse-auto'"
DEFAULT = f"{FUSED} and mode == 'default' and shapes == 'static' and device == 'cuda'"
ALONE = "workload in ('mul', 'add') and shapes == 'static' and device == 'cuda'"

CASES = (
    FAILED,
    Threshold(
        f"{FUSED} and median_us > {SLOWER} * inductor_us",
        lambda r: (
            f"{r.mode}: gatefuse {r.median_us:.2f} us is {r.ratio:.3f} of Inductor's "
            f"{r.inductor_us:.2f}"
        ),
    ),
    Threshold(
        f"{FUSED} and hot_median_us > {SLOWER} * hot_inductor_us",
        lambda r: (
            f"{r.mode}, hot: gatefuse {r.hot_median_us:.2f} us is "
            f"{r.hot_median_us / r.hot_inductor_us:.3f} of Inductor's {r.hot_inductor_us:.2f}"
        ),
    ),
    Threshold(
        f"{DEFAULT} and {ALONE} and median_us > {SLOWER} * best_us",
        lambda r: (
            f"gatefuse {r.median_us:.2f} us is {r.median_us / r.best_us:.3f} of the best "
            f"provider's {r.best_us:.2f} ({r.best})"
        ),
    ),
    Threshold(
        f"{DEFAULT} and {ALONE} and N <= {SMALL_ROWS} and median_us * {SPEEDUP} > inductor_us",
        lambda r: (
            f"gatefuse {r.median_us:.2f} us is {r.inductor_us / r.median_us:.2f} times as fast as "
            f"Inductor, not {SPEEDUP}"
        ),
    ),
    Threshold(
        f"{ALONE} and provider == 'op' and N >= {SMALL_ROWS} "
        f"and median_us > {ROOFLINE_RATIO} * roofline_us",
        lambda r: (
            f"the kernel takes {r.median_us:.2f} us, {r.median_us / r.roofline_us:.3f} of the "
            f"roofline {r.roofline_us:.2f}"
        ),
    ),
    Threshold(
        f"{ALONE} and provider == 'op' and N <= {BASELINE_ROWS} "
        f"and median_us > baseline_us + {BASELINE_US}",
        lambda r: f"the kernel takes {r.median_us:.2f} us, the best known one {r.baseline_us:.2f}",
    ),
    Threshold(
        f"{DEFAULT} and N <= {SMALL_ROWS} and 0 < inductor_cost_us "
        f"and inductor_cost_us < {GATE_COST_RATIO} * cost_us",
        lambda r: (
            f"the gate costs {r.cost_us:.2f} us, {r.inductor_cost_us / r.cost_us:.1f} times less "
            f"than under Inductor ({r.inductor_cost_us:.2f}), not {GATE_COST_RATIO:.0f}"
        ),
    ),
    Threshold(
        f"{DEFAULT} and cost_us > most_us and inductor_cost_us.notna()",
        lambda r: f"the gate costs {r.cost_us:.2f} us > {r.most_us}",
    ),
    Threshold(
        f"{DEFAULT} and workload == 'glue' and median_us > {EXPLAINED} * best_us",
        lambda r: f"best provider {r.best} {r.best_us:.2f} us, gatefuse {r.median_us:.2f}",
        reported=True,
    ),
)

PASS = Threshold(
    f"pass_ms > {PASS_SHARE} * compile_s * 1e3",
    lambda r: (
        f"{r.what}: the pass takes {r.pass_ms:.1f} ms, {r.pass_ms / r.compile_s / 10:.2f} % of "
        "the compile"
    ),
)

MODULES = (
    FAILED,
    Threshold(
        f"{FUSED} and median_us > {SLOWER} * inductor_us",
        lambda r: (
            f"{r.mode}: gatefuse {r.median_us:.1f} us is {r.median_us / r.inductor_us:.3f} of "
            f"Inductor's {r.inductor_us:.1f}"
        ),
    ),
    Threshold(
        f"{FUSED} and kernels > inductor_kernels",
        lambda r: (
            f"{r.mode}: gatefuse launches {r.kernels:g} kernels, Inductor {r.inductor_kernels:g}"
        ),
    ),
    dataclasses.replace(PASS, violated=f"{FUSED} and {PASS.violated}"),
)

SGLANG = Threshold(
    f"provider == 'op' and N <= {BASELINE_ROWS} and median_us > sglang_us + {BASELINE_US}",
    lambda r: (
        f"side by side the op takes {r.median_us:.2f} us, the best known kernel {r.sglang_us:.2f}"
    ),
)

HOST = (
    dataclasses.replace(FAILED, text=lambda r: f"{r.provider} failed: {r.error}"),
    Threshold(f"median_ms > {IMPORT_MS}", lambda r: f"{r.median_ms} ms > {IMPORT_MS}"),
    Threshold("initialises_cuda == True", lambda r: "initialises CUDA"),
    PASS,
    Threshold(
        f"{FUSED} and median_us > inductor_us",
        lambda r: f"{r.mode}: gatefuse {r.median_us:.1f} us > Inductor {r.inductor_us:.1f}",
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
        violation
        for frame, thresholds in _frames(results)
        for violation in _in_frame(frame, thresholds)
    ]
    return [
        dataclasses.replace(v, reason=reason)
        for v in found
        for reason in [
            next(
                (
                    r
                    for patterns, r in reasons()
                    if any(fnmatch.fnmatchcase(str(v), p) for p in patterns)
                ),
                None,
            )
        ]
    ]


def check(results: Results, partial: bool = False) -> list[Violation]:
    """Every violation that is an error. What was not measured is one too, unless ``partial``."""
    found = [v for v in violations(results) if not (v.reported and v.reason)]
    lacking = [] if partial else missing(results)
    return found + [Violation(case, "", "", f"not measured{what}") for case, what in lacking]


def _in_frame(frame: pd.DataFrame, thresholds: Iterable[Threshold]) -> Iterator[Violation]:
    frame = numeric(frame)
    found = [
        (row.Index, Violation(row.case, row.provider, row.mode, t.text(row), reported=t.reported))
        for t in thresholds
        for row in frame.query(t.violated, engine="python").itertuples()
    ]
    order = {case: i for i, case in enumerate(dict.fromkeys(frame["case"]))}
    for _, violation in sorted(found, key=lambda f: order[f[1].case]):
        yield violation


def _frames(results: Results) -> Iterator[tuple[pd.DataFrame, Iterable[Threshold]]]:
    """Each frame with what its thresholds need beside the measured."""
    cases = results.cases.copy()
    sizes = zip(cases["H"], cases["N"], cases["dtype"])
    cases["most_us"] = [
        GATE_COST_PREFILL_US.get((H, N), GATE_COST_US if N <= GATE_COST_ROWS else None)
        if dtype == grid.DTYPE
        else None
        for H, N, dtype in sizes
    ]
    yield cases, CASES
    sglang = results.sglang.copy()
    sglang["case"] = [f"{r.workload} H={r.H} N={r.N}" for r in sglang.itertuples()]
    sglang["mode"] = "beside sglang"
    theirs = sglang[sglang["provider"] == "sglang"].set_index("case")["median_us"]
    yield (
        sglang.assign(sglang_us=sglang["case"].map(theirs)).sort_values(["workload", "H", "N"]),
        (SGLANG,),
    )
    yield modules_beside_inductor(results.modules), MODULES
    yield _host_frame(results.host), HOST


def modules_beside_inductor(modules: pd.DataFrame) -> pd.DataFrame:
    """The rows with the time and kernels of Inductor in the same mode."""
    columns = dict.fromkeys([*modules.columns, "kernels", "pass_ms", "compile_s"])
    modules = modules.reindex(columns=list(columns))
    of = [*MODULE, "mode"]
    inductor = modules[modules["provider"] == "inductor"][[*of, "median_us", "kernels"]]
    inductor = inductor.rename(columns={"median_us": "inductor_us", "kernels": "inductor_kernels"})
    modules = modules.merge(inductor, on=of, how="left").sort_values(MODULE, kind="stable")
    modules["case"] = [f"{r.model} {r.part} N={r.tokens}" for r in modules.itertuples()]
    return modules.assign(what=modules["mode"])


def _host_frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    columns = ["case", "what", "workload", "provider", "mode", "median_us", "inductor_us"]
    columns += ["median_ms", "initialises_cuda", "pass_ms", "compile_s", "error"]
    frame = pd.DataFrame(rows).reindex(columns=dict.fromkeys([*columns, "cache", "median_s"]))
    case = {"call": "host {}", "compile": "compile {}", "import": "import"}
    frame["case"] = [case[r.what].format(r.workload) for r in frame.itertuples()]
    # What is imported and compiled is gatefuse's, whatever the provider.
    frame.loc[frame["what"] == "import", ["provider", "mode"]] = ["gatefuse-auto", "default"]
    inductor = frame[frame["provider"] == "inductor"].set_index(["what", "workload", "mode"])
    theirs = inductor["median_us"].to_dict()
    keys = zip(frame["what"], frame["workload"], frame["mode"])
    frame["inductor_us"] = [theirs.get(key) for key in keys]
    frame["compile_s"] = frame["median_s"]
    return frame.assign(what=frame["cache"].where(frame["what"] == "compile", frame["what"]))


def missing_of(results: Results, cases: Iterable[grid.Case]) -> list[tuple[str, str]]:
    """The cases that lack providers, and a text that names those, empty if all lack."""
    found = results.cases
    keys = found[[*CASE, "provider", "mode"]].itertuples(index=False, name=None)
    complete = found["error"].notna() | found["hot_median_us"].notna()
    measured = dict(zip(keys, complete))
    any_of = set(found["case"])
    lacking: dict[str, list[str]] = {}
    for case, N, p in grid.measured(cases):
        if p.draw:
            continue
        key = (case.device, case.shapes, p.workload, case.H, N, case.dtype)
        hot = measured.get((*key, p.name, p.mode))
        if hot is None or (grid.is_hot(case) and not hot):
            one = pd.Series(key, CASE)
            text = f"{p.name}, {p.mode}" + (", hot" if hot is not None else "")
            lacking.setdefault(case_name(one), []).append(text)
    return [(c, f": {'; '.join(lacks)}" if c in any_of else "") for c, lacks in lacking.items()]


def missing(results: Results) -> list[tuple[str, str]]:
    """What the committed results should cover and do not."""
    lacking = [part for one in grid.GRIDS.values() for part in missing_of(results, one.cases())]
    modules = results.modules[[*MODULE, "provider", "mode"]].itertuples(index=False, name=None)
    measured = set(modules)
    for case in grid.module_cases():
        for provider in grid.MODULE_PROVIDERS:
            if (case.model, case.part, case.tokens, provider, case.mode) not in measured:
                name = f"{case.model} {case.part} N={case.tokens}"
                lacking.append((name, f": {provider}, {case.mode}"))
    host = {(row["what"], row.get("cache", "")) for row in results.host}
    for what in (("call", ""), ("import", ""), ("compile", "cold"), ("compile", "warm")):
        if what not in host:
            lacking.append(("host", ": " + " ".join(what).strip()))
    return lacking
