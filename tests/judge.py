"""PyTorch's and transformers' own tests as judges: run with gatefuse and without, compared.

    python -m tests.judge --pytorch DIR --transformers DIR --json FILE

DIR: a checkout of the tag that matches the installed package. A test whose outcome differs fails
the run. As a pytest plugin, this module turns gatefuse on.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]
INDUCTOR = (
    "test_pattern_matcher.py",
    "test_custom_post_grad_passes.py",
    "test_custom_partitioner_fn.py",
)
MODELS = ("qwen2_moe", "qwen3_next", "qwen3_5_moe")


@dataclass
class Suite:
    """Files of a checkout, and how pytest runs them."""

    name: str
    checkout: Path
    folder: str
    files: list[str]
    arguments: list[str]


# --- the plugin ---------------------------------------------------------------------------------

_OUTCOMES: dict[str, dict[str, Any]] = {}
_RESULTS, _ENABLED = "JUDGE_RESULTS", "JUDGE_ENABLED"


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    import gatefuse

    entry = _OUTCOMES.setdefault(item.nodeid, {})
    with gatefuse.record() as report, _in_every_compile(os.environ[_ENABLED] == "1"):
        try:
            return (yield)
        finally:
            entry["fused"] = report.fused
            entry["graphs"] = len(report.graphs)


@contextlib.contextmanager
def _in_every_compile(enabled: bool) -> Iterator[None]:
    """Adds gatefuse's pass to whatever a test puts on the hooks: set beforehand, it would be gone
    in just those tests that set a hook."""
    from torch._inductor import compile_fx as module

    import gatefuse

    original = module.compile_fx
    inside: list[bool] = []

    def compile_fx(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if inside or args:  # Inductor calls itself once it has set the options
            return original(model, inputs, *args, **kwargs)
        inside.append(True)
        try:
            kwargs["config_patches"] = gatefuse.options(kwargs.get("config_patches"))
            return original(model, inputs, **kwargs)
        finally:
            inside.pop()

    if enabled:
        gatefuse.enable()
        module.compile_fx = compile_fx
    try:
        yield
    finally:
        module.compile_fx = original
        gatefuse.disable()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    entry = _OUTCOMES.setdefault(report.nodeid, {})
    if report.when == "call" or report.outcome != "passed":
        expected = hasattr(report, "wasxfail")
        entry["outcome"] = "xfailed" if expected and report.skipped else report.outcome
        if report.failed:
            entry["error"] = report.longreprtext.strip().splitlines()[-1]


def pytest_sessionfinish() -> None:
    if results := os.environ.get(_RESULTS):
        Path(results).write_text(json.dumps(_OUTCOMES))


# --- the comparison -----------------------------------------------------------------------------


def run_suite(suite: Suite, enabled: bool, test_timeout: int) -> dict[str, dict[str, Any]]:
    """Outcome, and number of fused gates, of each test."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.json"
        # The checkout has a package `tests` of its own, so the plugin goes by another name.
        paths = [str(REPOSITORY / "tests"), str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            _RESULTS: str(results),
            _ENABLED: str(int(enabled)),
            # A graph from a cache would be judged by its earlier run.
            "TORCHINDUCTOR_CACHE_DIR": str(Path(folder) / "inductor"),
            "HF_HUB_OFFLINE": "1",
        }
        subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "-q", "-p", "judge", "-p", "no:logging"),
                *(f"--timeout={test_timeout}", *suite.arguments, *suite.files),
            ],
            cwd=suite.checkout / suite.folder,
            env=environment,
            check=False,  # tests that fail either way are no finding
        )
        outcomes: dict[str, dict[str, Any]] = json.loads(results.read_text())
        return outcomes


def compare(suite: Suite, test_timeout: int) -> dict[str, Any]:
    """The suite's figures, and each test whose outcome gatefuse changes."""
    with ThreadPoolExecutor() as both:
        runs = both.map(lambda on: run_suite(suite, on, test_timeout), (False, True))
        without, with_gatefuse = runs
    names = sorted(without.keys() | with_gatefuse.keys())

    def outcome(run: dict[str, dict[str, Any]], name: str) -> Any:
        return run.get(name, {}).get("outcome", "missing")

    return {
        "source": source_of(suite.checkout),
        "files": suite.files,
        "arguments": suite.arguments,
        "tests": len(names),
        "outcomes": dict(Counter(outcome(without, name) for name in names)),
        "graphs_seen": sum(e.get("graphs", 0) for e in with_gatefuse.values()),
        "fused_gates": sum(e.get("fused", 0) for e in with_gatefuse.values()),
        "tests_with_a_fused_gate": sum(e.get("fused", 0) > 0 for e in with_gatefuse.values()),
        "different": [
            {"test": name, "without": without.get(name), "with": with_gatefuse.get(name)}
            for name in names
            if outcome(without, name) != outcome(with_gatefuse, name)
        ],
        "failed_both_ways": {
            name: without[name].get("error")
            for name in names
            if outcome(without, name) == outcome(with_gatefuse, name) == "failed"
        },
    }


def source_of(checkout: Path) -> str:
    if not (checkout / ".git").exists():  # git would describe what the folder is in
        return "no git checkout"
    command = ["git", "-C", str(checkout), "describe", "--always", "--tags"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "no git checkout"


def transformers_version() -> str:
    """Of the package that is imported, which may be a checkout's source."""
    try:
        module = importlib.import_module("transformers")
    except ImportError:
        return "not installed"
    return str(module.__version__)


def suites(pytorch: Path | None, transformers: Path | None) -> Iterator[Suite]:
    if pytorch is not None:
        folder = "test/inductor"
        files = [name for name in INDUCTOR if (pytorch / folder / name).exists()]
        yield Suite("pytorch", pytorch, folder, files, ["--noconftest", "--rootdir=../.."])
    if transformers is not None:
        tests = [f"tests/models/{name}/test_modeling_{name}.py" for name in MODELS]
        yield Suite("transformers", transformers, ".", tests, ["-k", "compile or fullgraph"])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.judge", description=__doc__)
    parser.add_argument("--pytorch", type=Path, help="a checkout of PyTorch")
    parser.add_argument("--transformers", type=Path, help="a checkout of transformers")
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--timeout", type=int, default=300, help="seconds for a test")
    arguments = parser.parse_args()
    result: dict[str, Any] = {
        "torch": torch.__version__,
        "transformers": transformers_version(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "suites": {},
    }
    for suite in suites(arguments.pytorch, arguments.transformers):
        found = result["suites"][suite.name] = compare(suite, arguments.timeout)
        print(f"{suite.name}: {found['tests']} tests, {found['outcomes']}")
        print(
            f"  {found['fused_gates']} gates fused in {found['tests_with_a_fused_gate']} tests, "
            f"{found['graphs_seen']} graphs seen"
        )
        for entry in found["different"]:
            print(f"  different: {entry}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1).replace(str(REPOSITORY), ".") + "\n")
    judged = result["suites"].values()
    # Where nothing ran, nothing was judged.
    return int(not judged or any(s["different"] or not s["outcomes"].get("passed") for s in judged))


if __name__ == "__main__":
    sys.exit(main())
