"""Result files, ``{"kind": str, "header": {...}, "rows": [...], "not_run": [...]}``, and what they
say together."""

from __future__ import annotations

import csv
import datetime
import functools
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.grid import NO_GATE, BlockKey, Key

ROOT = Path(__file__).parents[1]
"""Of a checkout; a meaningless directory where gatefuse is installed without one."""

Row = dict[str, Any]
ArmKey = tuple[str, str]  # arm, mode

EAGER: ArmKey = ("eager", "-")
LIMIT: ArmKey = ("limit", "-")
OP: ArmKey = ("op", "-")
INDUCTOR: ArmKey = ("inductor", "default")
GATEFUSE: ArmKey = ("gatefuse-auto", "default")
# Shown beside the arms and no rivals: the limit is no gate, and the op called by itself is the same
# kernel with programmatic dependent launch, which generated code cannot ask for.
BESIDE = (LIMIT, OP)


class BenchError(RuntimeError):
    """The command cannot run here; the message says what is missing."""


def checkout() -> Path:
    """The checkout that gatefuse is imported from. Raises BenchError if there is none."""
    if not (ROOT / "benchmarks" / "results").is_dir():
        raise BenchError(
            "the committed results are in a checkout of gatefuse, and this is an installed copy; "
            "name result files, or run `python -m gatefuse bench` in a checkout"
        )
    return ROOT


def header(device: str, arguments: list[str]) -> dict[str, Any]:
    """What is measured with what, and when; of several GPUs the first visible one is named.
    Initialises no device.

    Of ``arguments`` that are absolute paths only the last part is kept.
    """
    import torch

    import gatefuse
    from gatefuse.inductor.fusion_pass import GateFusionPass

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    return {
        "device": _gpu() if device == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton_version,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "gatefuse": gatefuse.__version__,
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
    """Name and driver."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    found = (_output(*query, "-i", visible) if visible else None) or _output(*query)
    return found.splitlines()[0] if found else None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def new_path(directory: Path, kind: str) -> Path:
    """A fresh file name; creates the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    return directory / f"{kind}-{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%S}.json"


def write(path: Path, content: dict[str, Any]) -> None:
    """Write whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


@dataclass
class Results:
    """Rows by what they are of: ``cells[key][arm, mode]`` of the chains, ``blocks`` of the modules
    of transformers, ``rivals[chain, H, N][arm]`` of the op beside the best known kernel, ``host``
    of host and compile time, ``engines`` whole files, of vLLM. ``headers`` are the files', by
    kind."""

    cells: dict[Key, dict[ArmKey, Row]] = field(default_factory=dict)
    blocks: dict[BlockKey, dict[ArmKey, Row]] = field(default_factory=dict)
    rivals: dict[tuple[str, int, int], dict[str, Row]] = field(default_factory=dict)
    host: list[Row] = field(default_factory=list)
    engines: list[dict[str, Any]] = field(default_factory=list)
    headers: dict[str, list[Row]] = field(default_factory=dict)

    def time(self, key: Key, arm: ArmKey, column: str = "median_us") -> float | None:
        """Median in µs, or None if the arm was not measured or failed. column: another one of the
        row, such as ``"hot_median_us"``."""
        return self.cells.get(key, {}).get(arm, {}).get(column)

    def gate_cost(self, key: Key, arm: ArmKey) -> float | None:
        """Time of ``arm`` in the glue at ``key`` minus that without the gate, compiled by Inductor
        in the same mode (eager against eager), in µs."""
        plain = EAGER if arm == EAGER else ("inductor", arm[1])
        without = self.time(key._replace(chain=key.chain + NO_GATE), plain)
        with_gate = self.time(key, arm)
        return None if with_gate is None or without is None else with_gate - without

    def best_arm(self, key: Key) -> tuple[ArmKey, float] | None:
        """The fastest arm that computes the gate from compiled or eager code."""
        times = {
            arm: us
            for arm in self.cells.get(key, {})
            if arm not in BESIDE and (us := self.time(key, arm)) is not None
        }
        return min(times.items(), key=lambda item: item[1]) if times else None


def collect(files: Iterable[dict[str, Any]]) -> Results:
    """Merge the contents of result files, in order. Of several files that measured the same cell,
    the last one counts, whole: a ratio is never taken across runs."""
    results = Results()
    for content in files:
        kind = content["kind"]
        results.headers.setdefault(kind, []).append(content["header"])
        if kind == "host":
            # Files from before warm caches were measured do not name the cache.
            results.host = [
                {"cache": "cold", **row} if row["what"] == "compile" else row
                for row in content["rows"]
            ]
        elif kind in ("core", "cpu"):
            device: Literal["gpu", "cpu"] = "cpu" if kind == "cpu" else "gpu"
            draws: dict[Key, dict[ArmKey, list[Row]]] = {}
            for row in content["rows"]:
                columns = ("shapes", "chain", "H", "N", "dtype")
                arms = draws.setdefault(Key(device, *(row[c] for c in columns)), {})
                arms.setdefault((row["arm"], row["mode"]), []).append(row)
            results.cells |= {
                key: {arm: _expected(rows) for arm, rows in arms.items()}
                for key, arms in draws.items()
            }
        elif kind == "peer":
            for row in content["rows"]:
                if "arm" in row:
                    results.rivals.setdefault((row["chain"], row["H"], row["N"]), {})[
                        row["arm"]
                    ] = row
        elif kind == "vllm":
            results.engines.append(content)
        elif kind == "blocks":
            # Modes are cells of their own here: each holds both of its arms.
            compiles: dict[tuple[BlockKey, ArmKey], list[Row]] = {}
            for row in content["rows"]:
                block = BlockKey(row["model"], row["part"], row["tokens"])
                compiles.setdefault((block, (row["arm"], row["mode"])), []).append(row)
            for (block, arm), rows in compiles.items():
                results.blocks.setdefault(block, {})[arm] = _fastest(rows)
    return results


def _expected(draws: list[Row]) -> Row:
    """Of several compiles of an arm: the mean of their times, between the shortest and the longest.
    A draw that failed stands for all."""
    for row in draws:
        if "error" in row:
            return row
    if len(draws) == 1:
        return draws[0]
    expected = dict(draws[0])
    for inputs in ("", "hot_"):
        times = [float(row[f"{inputs}median_us"]) for row in draws if f"{inputs}median_us" in row]
        if times:
            expected[f"{inputs}median_us"] = sum(times) / len(times)
            expected[f"{inputs}p10_us"], expected[f"{inputs}p90_us"] = min(times), max(times)
    return expected


def _fastest(compiles: list[Row]) -> Row:
    """Of several compiles of an arm: the fastest, and the median of the slowest as ``slowest_us``.
    A compile that failed stands for all."""
    for row in compiles:
        if "median_us" not in row:
            return row
    fastest = min(compiles, key=lambda row: row["median_us"])
    slowest = max(compiles, key=lambda row: row["median_us"])
    return {**fastest, "slowest_us": slowest["median_us"]}


def load(paths: Iterable[Path]) -> Results:
    """The files' contents in the order of their dates."""
    files = [json.loads(path.read_text()) for path in paths]
    return collect(sorted(files, key=lambda content: content["header"]["date"]))


def committed() -> Results:
    """All committed results."""
    return load((checkout() / "benchmarks" / "results").glob("*.json"))


@functools.cache
def peers() -> dict[tuple[str, int, int], float]:
    """µs of the best known hand-written kernel by chain, width and rows, from
    ``benchmarks/peers.csv``; empty without a checkout."""
    path = ROOT / "benchmarks" / "peers.csv"
    if not path.exists():
        return {}
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    return {
        (row["chain"], int(row["H"]), int(row["N"])): float(row["peer_pdl"])
        for row in csv.DictReader(lines)
    }
