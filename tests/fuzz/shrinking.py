"""Makes a failing case smaller."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from tests.fuzz.engines import run_eagerly
from tests.fuzz.programs import Case, Line, Loaded
from tests.fuzz.runner import run_case

__all__ = ["shrink"]


def shrink(case: Case, engine: str, device: str = "cpu", limit: int = 60) -> Case:
    """The case without what it fails without, found in at most ``limit`` runs."""
    crashes = _crashes(case, engine, device)
    progress = True
    while progress:
        progress = False
        for smaller in _smaller(case):
            if not _runs(smaller):
                continue
            if limit == 0:
                return case
            limit -= 1
            if _crashes(smaller, engine, device) == crashes:
                case, progress = smaller, True
                break
    return case


def _crashes(case: Case, engine: str, device: str) -> bool | None:
    """Whether the case fails with an exception; None if it does not fail."""
    problems = run_case(case, engine, device).problems
    return problems[0].startswith("Traceback") if problems else None


def _runs(case: Case) -> bool:
    loaded = Loaded(case, "cpu")
    try:
        run_eagerly(loaded, drawn=None)
    except Exception:
        return False
    finally:
        loaded.forget()
    return True


def _smaller(case: Case) -> Iterator[Case]:
    for name in ("autocast", "checkpoint", "coordinate_descent", "padded_products"):
        if getattr(case, name):
            yield replace(case, **{name: False})
    if len(case.sizes) > 1:
        yield replace(case, sizes=case.sizes[:1])
    for line in reversed(case.lines):
        if smaller := _without(case, line):
            yield smaller
    for i, output in enumerate(case.outputs):
        if len(case.outputs) > 1 and output not in case.draws:  # draws are replayed from outputs
            yield _pruned(replace(case, outputs=case.outputs[:i] + case.outputs[i + 1 :]))


def _without(case: Case, line: Line) -> Case | None:
    """Without a line and the outputs that are what it makes."""
    outputs = tuple(o for o in case.outputs if o.split(".")[0] != line.target or not line.target)
    lines = tuple(other for other in case.lines if other is not line)
    return _pruned(replace(case, lines=lines, outputs=outputs)) if outputs else None


def _pruned(case: Case) -> Case:
    """Without lines and inputs of which nothing is used."""
    used = {name for output in case.outputs for name in output.split(".")}
    lines = []
    for line in reversed(case.lines):
        if line.target in used or line.draws or not line.target:
            lines.append(line)
            used |= line.names()
    return replace(
        case,
        lines=tuple(reversed(lines)),
        arguments=tuple(n for n in case.arguments if n in used),
        state=tuple(n for n in case.state if n in used),
    )
