"""A report as text: the verdict first, then the gates, then what was left alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from gatefuse.advice import advice
from gatefuse.origin import layers_as_text
from gatefuse.records import (
    Activity,
    GradientReport,
    GraphReport,
    ModelGates,
    RejectionReport,
    SiteReport,
)

__all__ = [
    "extras",
    "gates_and_fused",
    "gradients_as_text",
    "grouped",
    "line_of",
    "nothing_compiled",
    "placed",
    "summary",
    "verdict",
]

_Found = TypeVar("_Found")
_Key = TypeVar("_Key")
_CUT = ("the logit is an input of the graph", "in this graph, which returns it")


def gates_and_fused(graphs: Sequence[GraphReport], model: ModelGates | None) -> tuple[int, int]:
    """Number of gates, and how many of them are fused.

    Those of the model where it is known; else those that the graphs have, which counts a gate once
    per graph in which it is.
    """
    if model is not None:
        return len(model.gates), len(model.fused)
    fused = sum(g.fused for g in graphs)
    return fused + sum(r.kind == "gate" for g in graphs for r in g.rejections), fused


def verdict(
    graphs: Sequence[GraphReport],
    model: ModelGates | None,
    activity: Activity,
    note: str | None,
) -> str:
    """The first line."""
    gates, fused = gates_and_fused(graphs, model)
    if gates:
        text = f"{fused} of {gates} gates {'fuse' if activity.scanned else 'fused'}"
    elif not graphs or any(r.kind == "near miss" for g in graphs for r in g.rejections):
        text = "no gate fused"
    else:
        text = "no gate found"
    if why := nothing_compiled(graphs, activity, note):
        return f"{text}: {why}"
    compiled = [g for g in graphs if g.phase != "subgraph" and not activity.scanned]
    return f"{text} in {_number(len(compiled), 'graph')}" if compiled else text


def nothing_compiled(
    graphs: Sequence[GraphReport], activity: Activity, note: str | None
) -> str | None:
    """Why the pass has seen no graph at all, and what to do; None if it has, or would have."""
    if graphs:
        return None
    if note:
        return note
    if activity.switched_off:
        return f"PyTorch compiles nothing: {activity.switched_off}"
    if activity.cached:
        return (
            f"{_number(activity.cached, 'graph')} came from Inductor's cache, without a gate in "
            "them. TORCHINDUCTOR_FORCE_DISABLE_CACHES=1 compiles anew"
        )
    if activity.graphs and activity.hooked:
        return (
            f"{_number(activity.graphs, 'graph')} went to another backend than Inductor, which "
            'runs no passes. Use backend="gatefuse" or "inductor"'
        )
    if activity.graphs:
        return (
            f"{_number(activity.graphs, 'graph')} compiled without gatefuse. Compile with "
            'backend="gatefuse", or call gatefuse.enable() in the same thread first'
        )
    if activity.elsewhere:
        return (
            "the compilation ran in another thread, and a report covers its own thread only. Open "
            "the block in the thread that calls the model"
        )
    if activity.breaks:
        return f"nothing could be compiled. PyTorch's reason: {_first_lines(activity.breaks)}"
    not_at_all = "pass the model to torch.compile, and call the result in the block"
    if activity.before:
        return (
            "nothing was compiled in this block. If the model was compiled before it, open the "
            "block before the model's first call, or call torch._dynamo.reset() first; if not, "
            f"{not_at_all}"
        )
    return f"nothing was compiled in this block: {not_at_all}"


def summary(
    graphs: Sequence[GraphReport],
    model: ModelGates | None,
    activity: Activity,
    note: str | None,
) -> str:
    """The whole report."""
    lines = [f"gatefuse: {verdict(graphs, model, activity, note)}"]
    if model is not None and model.note:
        lines.append(f"  ({model.note})")
    if graphs and note:
        lines.append(f"  {note}")
    lines += _fused([s for g in graphs for s in g.sites])
    lines += _gradients([r for g in graphs for r in g.gradients])
    rejections = [r for g in graphs for r in g.rejections]
    for kind, one, many in (("gate", "gate", "gates"), ("near miss", "near miss", "near misses")):
        alike = [r for r in rejections if r.kind == kind]
        if alike:
            lines.append(f"  {len(alike)} {one if len(alike) == 1 else many} left alone:")
            lines += _left_alone(alike, activity)
    if model is not None:
        lines += _missing(model)
    lines += _others([r for r in rejections if r.kind == "other"])
    lines += _graphs(graphs)
    return "\n".join(lines)


def grouped(found: Iterable[_Found], key: Callable[[_Found], _Key]) -> dict[_Key, list[_Found]]:
    """What is alike, in the order of the first of each."""
    groups: dict[_Key, list[_Found]] = {}
    for one in found:
        groups.setdefault(key(one), []).append(one)
    return groups


def gradients_as_text(found: GradientReport) -> str:
    """What became of a gate's gradients, in a line."""
    named = (("input", found.input), ("weight", found.weight))
    text = "; ".join(f"{name}: {form}" for name, form in named if form)
    text = text or "neither the input's nor the weight's is in this graph"
    return f"{text} ({found.reason})" if found.reason else text


def line_of(found: SiteReport | RejectionReport) -> tuple[str, str | None]:
    """Where something is in the source, or in the graph, and the text of the line."""
    return found.location or found.node, found.line


def extras(site: SiteReport) -> list[str]:
    """What a fused gate has beside linear, sigmoid and multiply."""
    named = (("bias", site.has_bias), ("addend", site.has_addend), ("logit", site.keeps_logit))
    return [name for name, present in named if present]


def placed(site: SiteReport) -> str:
    """What a fused gate became, and why."""
    return f"{site.placement}: {site.placement_reason}" if site.placement else "not lowered"


def _fused(sites: list[SiteReport]) -> Iterator[str]:
    for (location, line), found in grouped(sites, line_of).items():
        yield f"  {location}"
        if line:
            yield f"    {line}"
        for (form, became), alike in grouped(found, lambda s: (_form(s), placed(s))).items():
            layers = layers_as_text([s.layer for s in alike if s.layer])
            yield f"    {_number(len(alike), 'gate')}, {form}{f', in {layers}' if layers else ''}"
            yield f"      {became}"


def _gradients(found: list[GradientReport]) -> Iterator[str]:
    for became, alike in grouped(found, gradients_as_text).items():
        yield f"  gradients of {_number(len(alike), 'gate')}: {became}"


def _form(site: SiteReport) -> str:
    size = f"{site.rows} x {site.H}" + (f" -> {site.D}" if site.H != site.D else "")
    return ", ".join(filter(None, (size, site.dtype, " ".join(f"+{e}" for e in extras(site)))))


def _left_alone(rejections: list[RejectionReport], activity: Activity) -> Iterator[str]:
    for (location, line, reason), alike in grouped(
        rejections, lambda r: (*line_of(r), r.reason)
    ).items():
        layers = layers_as_text([r.layer for r in alike if r.layer])
        times = f"{len(alike)} x " if len(alike) > 1 else ""
        yield f"    {times}{location}{f', in {layers}' if layers else ''}"
        if line:
            yield f"      {line}"
        yield f"      {reason}"
        if reason.endswith(_CUT) and activity.breaks:
            cause = "a graph break" if len(activity.breaks) == 1 else "one of these graph breaks"
            yield f"      cut by {cause}: {_first_lines(activity.breaks)}"
        if change := advice(reason):
            yield f"      to do: {change}"


def _missing(model: ModelGates) -> Iterator[str]:
    if model.not_compiled:
        names = layers_as_text(model.not_compiled)
        number = len(model.not_compiled)
        yield f"  {_number(number, 'Linear(H, 1)')} in no compiled graph, gate or not: {names}"


def _others(rejections: list[RejectionReport]) -> Iterator[str]:
    if not rejections:
        return
    reasons = Counter(r.reason for r in rejections)
    most = "; ".join(f"{n} x {reason}" for reason, n in reasons.most_common(3))
    more = f"; {len(reasons) - 3} other reasons" if len(reasons) > 3 else ""
    yield f"  {_number(len(rejections), 'sigmoid')} that cannot be gates ({most}{more})"


def _graphs(graphs: Sequence[GraphReport]) -> Iterator[str]:
    for g in graphs:
        if g.error:
            yield f"  {g.name}: left unfused after an error: {g.error}"
    cached = [g for g in graphs if g.from_cache]
    if cached:
        fused = sum(g.fused for g in cached)
        yield f"  from Inductor's cache: {_number(len(cached), 'graph')}, {fused} fused"
        if any(g.phase == "unknown" for g in cached):
            yield (
                "    what was known of them is not in the cache's folder: "
                "TORCHINDUCTOR_FORCE_DISABLE_CACHES=1 compiles anew"
            )


def _number(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 or what.endswith(')') else 's'}"


def _first_lines(breaks: dict[str, int]) -> str:
    texts = []
    for reason in list(breaks)[:3]:
        lines = [line.strip() for line in reason.splitlines() if line.strip()]
        texts.append(": ".join(line.removeprefix("Explanation: ") for line in lines[:2]))
    more = f"; and {len(breaks) - 3} more" if len(breaks) > 3 else ""
    return "; ".join(texts) + more
