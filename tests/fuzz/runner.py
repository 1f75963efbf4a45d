"""Runs cases one after another, or some at a time, and counts what they covered."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import re
import traceback
from collections import Counter
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field

import gatefuse
from tests.fuzz.engines import ENGINES, Unusable
from tests.fuzz.generate import generate
from tests.fuzz.judge import problems
from tests.fuzz.programs import Case, Loaded

__all__ = ["LEAST_FUSED", "Result", "failure", "run_case", "run_cases"]

LEAST_FUSED = 0.15
"""The share of cases with a fused gate below which a run proves nothing. In half of the cases
numbers are drawn, and gates are left alone where that happens more than once."""

_CHUNK = 8


@dataclass
class Result:
    """What became of a case. skipped: why it cannot be compiled without gatefuse either."""

    id: str
    problems: list[str] = field(default_factory=list)
    skipped: str = ""
    counts: Counter[str] = field(default_factory=Counter)


def run_case(case: Case, engine: str, device: str = "cpu") -> Result:
    result = Result(case.id)
    loaded = Loaded(case, device)
    try:
        compiled = ENGINES[engine](loaded)
        result.problems = problems(loaded, compiled, strides_of_gradients=engine == "fast")
        result.counts = _counts(case, compiled.report)
    except Unusable as e:
        result.skipped = str(e)
    except Exception:
        result.problems.append(traceback.format_exc())
    finally:
        loaded.forget()
    return result


def run_cases(
    seed: int, indices: range, engine: str, device: str = "cpu", jobs: int = 1
) -> Iterator[Result]:
    """The results of the cases, in any order."""
    chunks = [indices[i : i + _CHUNK] for i in range(0, len(indices), _CHUNK)]
    if jobs == 1:
        for chunk in chunks:
            yield from _run_chunk(seed, chunk, engine, device)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, context, max_tasks_per_child=50) as pool:
        futures = {pool.submit(_run_chunk, seed, c, engine, device): c for c in chunks}
        for future in concurrent.futures.as_completed(futures):
            try:
                yield from future.result()
            except BrokenProcessPool:
                chunk = futures[future]
                yield Result(f"{seed}:{chunk[0]}", [f"the process died in one of {chunk}"])


def _run_chunk(seed: int, indices: range, engine: str, device: str) -> list[Result]:
    return [run_case(generate(seed, index), engine, device) for index in indices]


def _counts(case: Case, report: gatefuse.Report) -> Counter[str]:
    """What the case covered: of its features those of a case in which a gate was fused."""
    sites = report.sites
    counts = Counter(
        {
            "gates fused": len(sites),
            "gates that keep a logit": sum(s.keeps_logit for s in sites),
            "gates with a bias": sum(s.has_bias for s in sites),
            "gates with an addend": sum(s.has_addend for s in sites),
            "gates in backward graphs": sum(
                g.fused for g in report.graphs if g.phase == "backward"
            ),
            "products of gradients rewritten": sum(
                gradients.rewritten for g in report.graphs for gradients in g.gradients
            ),
            "sigmoids left alone": len(report.rejections),
        }
    )
    counts.update(f"left alone: {_general(r.reason)}" for r in report.rejections)
    if not sites:
        return counts
    source = case.source()
    features = {
        "": True,
        " and several gates": len(sites) > 1,
        " and several kept logits": sum(s.keeps_logit for s in sites) > 1,
        " and training": case.grad,
        " and dynamic rows": case.dynamic == "rows",
        " and all sizes dynamic": case.dynamic == "all",
        " and an unbacked size": "torch.nonzero" in source,
        " and no rows": 0 in case.sizes,
        " and autocast": case.autocast,
        " and checkpointing": case.checkpoint,
        " and NaN or infinity": case.special,
        " and random draws": bool(case.draws),
        " and writes": re.search(r"_\(|\] = \d|fill_", source.replace("sigmoid_(", "")) is not None,
        " and writes inside the graph": case.inject is not None,
        " and coordinate descent": case.coordinate_descent,
        " and padded products": case.padded_products,
        " and a low precision": "float16" in source,
        " and aliased inputs": re.search(r"^    a\d+ =", source, re.M) is not None,
        " and an output twice": len(set(case.outputs)) < len(case.outputs),
    }
    counts.update(f"cases with a fused gate{name}" for name, present in features.items() if present)
    return counts


def _general(reason: str) -> str:
    return re.sub(r"\(.*?\)|\[.*?\]|\d+", "#", reason)


def failure(result: Result, engine: str, device: str) -> str:
    """What failed, and the command that replays it."""
    options = f"--engine {engine}" + ("" if device == "cpu" else f" --device {device}")
    lines = "\n".join(f"  {problem}" for problem in result.problems)
    command = f"python -m tests.fuzz {options} --case {result.id}"
    return f"FAILED {result.id}\n{lines}\n  replay: {command}"
