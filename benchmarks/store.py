"""Result files, ``{"kind": str, "header": {...}, "rows": [...], "not_run": [...]}``, and what they
say together, as data frames."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.grid import DTYPE, NO_GATE, BenchError, Key
from benchmarks.sweep import Row
from gatefuse.bench.cases import LEAST_TRAFFIC

ROOT = Path(__file__).parents[1]

CASE = list(Key._fields)
TIMES = [f"{hot}{name}_us" for hot in ("", "hot_") for name in ("median", "p10", "p90")]
MODULE = ["model", "part", "tokens"]
BESIDE = ("roofline", "op")
"""Shown beside the providers, not among them: the roofline is no gate, and the op called by itself
is the same kernel with programmatic dependent launch, which generated code cannot ask for."""


def header(device: str, arguments: list[str]) -> Row:
    """What is measured with what, and when; of several GPUs the first visible one is named. Of
    ``arguments`` that are absolute paths only the last part is kept. Initialises no device."""
    import torch

    from gatefuse.environment import version
    from gatefuse.inductor.fusion_pass import GateFusionPass

    return {
        "device": _gpu() if device == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "triton", "gatefuse")},
        "cuda": torch.version.cuda,
        "commit": _output("git", "describe", "--always", "--dirty", "--abbrev=12"),
        "sources": GateFusionPass().uuid(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "arguments": [Path(a).name if Path(a).is_absolute() else a for a in arguments],
    }


def _output(*command: str) -> str | None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=30)
    except OSError:
        return None
    return result.stdout.strip() or None if result.returncode == 0 else None


def _gpu() -> str | None:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    found = (_output(*query, "-i", visible) if visible else None) or _output(*query)
    return found.splitlines()[0] if found else None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search("model name.*: (.*)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def new_path(directory: Path, kind: str) -> Path:
    """A fresh file name; creates the directory."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BenchError(f"{directory} cannot be made: {error.strerror}") from None
    return directory / f"{kind}-{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%S}.json"


def write(path: Path, content: dict[str, Any]) -> None:
    """Write whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


@dataclass
class Results:
    """Frames with a row for each case and provider: ``cases`` of the workloads, ``modules`` of
    transformers, ``sglang`` of the op beside SGLang's kernel; ``host``: rows of host and compile
    time; ``engines``: whole files, of vLLM. ``headers`` are the files', by kind."""

    cases: pd.DataFrame
    modules: pd.DataFrame
    sglang: pd.DataFrame
    host: list[Row] = field(default_factory=list)
    engines: list[dict[str, Any]] = field(default_factory=list)
    headers: dict[str, list[Row]] = field(default_factory=dict)


def matches(frame: pd.DataFrame, where: dict[str, Any]) -> pd.Series:
    """Which rows have these values."""
    return (frame[list(where)] == pd.Series(where)).all(axis=1)


def read(path: Path) -> dict[str, Any]:
    """A file's content; BenchError if there is none, or it is no result file."""
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        of = {type(part) for part in (content, content["header"], *content["rows"])}
        if of == {dict} and isinstance(content["header"]["date"], str):
            return content
    except OSError as error:
        raise BenchError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, LookupError, TypeError, AttributeError):
        pass
    raise BenchError(f"{path} is not a result file")


def load(paths: Iterable[Path], timed: bool = False) -> Results:
    """The files' contents in the order of their dates. timed: BenchError where sizes are toys."""
    files = [read(path) for path in paths]
    if files and not any(content["rows"] for content in files):
        raise BenchError("nothing was measured: the time was over (--time-budget) before a case")
    if timed and any(content["header"].get("quick") for content in files):
        raise BenchError("toy sizes (--quick) show that all runs, and nothing about speed")
    return collect(sorted(files, key=lambda content: content["header"]["date"]))


def committed() -> Results:
    return load((ROOT / "benchmarks" / "results").glob("*.json"))


def collect(files: Iterable[dict[str, Any]]) -> Results:
    """Merge contents of result files. Of several that measured the same case the last one counts,
    whole: a ratio is never taken across runs."""
    rows: dict[str, list[Row]] = {"cases": [], "modules": [], "sglang": []}
    host, engines, headers = [], [], {}
    for number, content in enumerate(files):
        kind = content["kind"]
        headers.setdefault(kind, []).append(content["header"])
        if kind == "host":
            host = content["rows"]
        elif kind == "vllm":
            engines.append(content)
        elif kind in ("workloads", "cpu"):
            of = {"device": "cuda" if kind == "workloads" else "cpu", "file": number}
            rows["cases"] += [row | of for row in content["rows"]]
        elif kind in rows:
            rows[kind] += [row | {"file": number} for row in content["rows"] if "provider" in row]
    return Results(
        cases=_expected(_frame(rows["cases"], [*CASE, *TIMES, "bytes", "peak_bytes", "fused"])),
        modules=_fastest(_frame(rows["modules"], [*MODULE, *TIMES[:3], "peak_bytes"])),
        sglang=_newest(_frame(rows["sglang"], ["workload", "H", "N", "median_us"]), ["provider"]),
        host=host,
        engines=engines,
        headers=headers,
    )


def _frame(rows: list[Row], columns: list[str]) -> pd.DataFrame:
    frame = pd.DataFrame(rows)
    all_ = dict.fromkeys([*columns, "provider", "mode", "error", "file", *frame.columns])
    frame = numeric(frame.reindex(columns=list(all_)))
    texts = ("device", "shapes", "workload", "dtype", "model", "part", "provider", "mode")
    return frame.astype({name: "str" for name in texts if name in frame})


def numeric(frame: pd.DataFrame) -> pd.DataFrame:
    """With its measured columns as floats, those that are empty also."""
    ends = ("_us", "_ms", "_s", "kernels", "bytes", "fused")
    return frame.astype({name: float for name in frame if str(name).endswith(ends)})


def _newest(frame: pd.DataFrame, more: list[str]) -> pd.DataFrame:
    """Of each case (``more``: and of what else) the rows of the last file."""
    of = [c for c in (*CASE, *MODULE) if c in frame] + more
    return frame[frame["file"] == frame.groupby(of)["file"].transform("max")]


def _expected(cases: pd.DataFrame) -> pd.DataFrame:
    """Of several compiles of a provider: the mean of their times, between the shortest and the
    longest. One that failed stands for all. With what else a table or a threshold shows."""
    of = [*CASE, "provider", "mode"]
    cases = _newest(cases, []).copy()
    several = cases.duplicated(of, keep=False)
    for hot in ("", "hot_"):
        for name in ("p10", "p90"):
            cases.loc[several, f"{hot}{name}_us"] = cases[f"{hot}median_us"]
    steps = dict(zip(TIMES, ("mean", "min", "max") * 2))
    steps |= dict.fromkeys(("bytes", "fused", "error"), "first") | {"peak_bytes": "max"}
    cases = cases.groupby(of, sort=False).agg(steps).reset_index()
    cases = cases.sort_values(CASE, kind="stable", ignore_index=True)
    cases.loc[cases["error"].notna(), TIMES] = float("nan")
    return _with_ratios(cases)


def _fastest(modules: pd.DataFrame) -> pd.DataFrame:
    """Of several compiles of a provider: the fastest, with the median of the slowest and the most
    memory. One that failed stands for all."""
    of = [*MODULE, "provider", "mode"]
    modules = _newest(modules, ["provider", "mode"]).sort_values(
        [*of, "median_us"], na_position="first", kind="stable"
    )
    most = modules.groupby(of)[["median_us", "peak_bytes"]].transform("max")
    modules = modules.assign(slowest_us=most["median_us"], peak_bytes=most["peak_bytes"])
    return modules.drop_duplicates(of).reset_index(drop=True)


def _with_ratios(cases: pd.DataFrame) -> pd.DataFrame:
    """Beside each time those that it is compared with, all of the same run."""
    cases["case"] = [str(Key(*key)) for key in cases[CASE].itertuples(index=False)]
    inductor = cases[cases["provider"] == "inductor"]
    for hot in ("", "hot_"):
        cases[f"{hot}inductor_us"] = _look_up(cases, inductor, f"{hot}median_us", ["mode"])
    cases["ratio"] = cases["median_us"] / cases["inductor_us"]
    peak = _look_up(cases, inductor, "peak_bytes", ["mode"])
    cases["more_memory"] = cases["peak_bytes"] / peak
    for provider in BESIDE:
        there = cases[cases["provider"] == provider]
        cases[f"{provider}_us"] = _look_up(cases, there, "median_us", [])
    cases["least_us"] = cases["roofline_us"] * cases["workload"].map(LEAST_TRAFFIC).fillna(1)
    # The gate's cost: the time minus that without the gate, compiled by Inductor in the same mode
    # (eager, whose mode is "-", against eager).
    of = cases["workload"].str.endswith(NO_GATE) & cases["provider"].isin(("eager", "inductor"))
    plain = cases[of].assign(workload=cases["workload"].str.removesuffix(NO_GATE))
    without = _look_up(cases, plain, "median_us", ["mode"])
    without[cases["provider"].isin(BESIDE)] = float("nan")
    cases["cost_us"] = cases["median_us"] - without
    cases["inductor_cost_us"] = cases["inductor_us"] - without
    # The best provider that computes the gate from compiled or eager code.
    others = cases[~cases["provider"].isin(BESIDE)].sort_values("median_us", kind="stable")
    best = others.drop_duplicates(CASE).assign(best=others["provider"] + ", " + others["mode"])
    cases["best_us"] = _look_up(cases, best, "median_us", [])
    cases["best"] = _look_up(cases, best, "best", [])
    baseline = pd.read_csv(ROOT / "benchmarks" / "peers.csv", comment="#")
    merged = cases.merge(baseline, on=["workload", "H", "N"], how="left")
    cases["baseline_us"] = merged["peer_pdl"].where(cases["dtype"] == DTYPE)
    return cases


def _look_up(cases: pd.DataFrame, rows: pd.DataFrame, column: str, more: list[str]) -> pd.Series:
    """For each of ``cases`` the ``column`` of the one of ``rows`` that has the same case."""
    of = [*CASE, *more]
    found = cases[of].merge(rows[[*of, column]], on=of, how="left")
    return found[column].set_axis(cases.index)
