"""A report as one HTML page: no network, no script, nothing outside the file."""

from __future__ import annotations

import importlib
import platform
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from html import escape

import torch

from gatefuse import drawing, excerpts
from gatefuse.advice import advice
from gatefuse.origin import layers_as_text, without_folders
from gatefuse.page_style import STYLE
from gatefuse.records import Activity, GraphReport, ModelGates, SiteReport
from gatefuse.summary import extras, gates_and_fused, grouped, line_of, placed, verdict

__all__ = ["html"]

_LONGEST = 300
"""Lines of one kernel on the page; a folder that `Report.save` has written has all of them."""

_Site = tuple[GraphReport, SiteReport]


def html(
    graphs: Sequence[GraphReport],
    model: ModelGates | None,
    activity: Activity,
    note: str | None,
) -> str:
    """The page of a report, of which these are the parts."""
    sections = [
        ("model", "The model", _model(model)),
        ("fused", "Fused gates", _fused([(g, s) for g in graphs for s in g.sites])),
        ("left", "Gates left alone", _left_alone(graphs, "gate")),
        ("near", "Near misses", _left_alone(graphs, "near miss")),
        ("other", "Other sigmoids", _others(graphs)),
        ("breaks", "Graph breaks", _breaks(activity)),
        ("graphs", "Graphs", _graphs(graphs)),
        ("versions", "Versions", _table(("", ""), _versions())),
    ]
    shown = [(id, title, body) for id, title, body in sections if body]
    first = verdict(graphs, model, activity, note)
    links = "".join(f'<li><a href="#{id}">{title}</a></li>' for id, title, _ in shown)
    body = "".join(
        f'<section id="{id}" aria-labelledby="{id}-title"><h2 id="{id}-title">{title}</h2>'
        f"{text}</section>"
        for id, title, text in shown
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>gatefuse: {escape(without_folders(first))}</title>"
        f'<link rel="icon" href="data:,"><style>{STYLE}</style></head><body><main>'
        f"{_header(graphs, model, first, note)}"
        f'<nav aria-label="On this page"><ul>{links}</ul></nav>{body}</main></body></html>'
    )


def _header(
    graphs: Sequence[GraphReport], model: ModelGates | None, first: str, note: str | None
) -> str:
    gates, fused = gates_and_fused(graphs, model)
    kind, sign = "some", "!"
    if gates and fused == gates:
        kind, sign = "all", "✓"
    elif not fused:
        kind, sign = "none", "-"
    headline, _, why = without_folders(first).partition(": ")
    notes = [why, model.note if model is not None else "", note if graphs and note else ""]
    more = "".join(f"<p>{escape(without_folders(n))}</p>" for n in notes if n)
    return (
        f'<header class="{kind}"><p class="name">gatefuse</p>'
        f'<h1><span class="sign" aria-hidden="true">{sign}</span>{escape(headline)}</h1>{more}'
        "</header>"
    )


def _model(model: ModelGates | None) -> str:
    if model is None or not (model.gates or model.not_compiled):
        return ""
    left = [name for name in model.gates if name not in model.fused]
    rows = [
        ("Fused", model.fused),
        ("Not fused", left),
        ("In no compiled graph", model.not_compiled),
    ]
    return _table(
        ("", "gates", "modules"),
        [(what, str(len(names)), layers_as_text(names)) for what, names in rows if names],
    )


def _fused(sites: list[_Site]) -> str:
    groups = grouped(sites, lambda found: line_of(found[1]))
    return "".join(_group(*where, found) for where, found in groups.items())


def _group(location: str, line: str | None, found: list[_Site]) -> str:
    kinds = grouped(
        (s for _, s in found), lambda s: (_size(s), s.dtype, ", ".join(extras(s)), placed(s))
    )
    facts = _table(
        ("gates", "layers", "rows x width", "dtype", "with", "placement"),
        [
            (str(len(alike)), layers_as_text([s.layer for s in alike if s.layer]), *what)
            for what, alike in kinds.items()
        ],
    )
    graph, site = found[0]
    drawn = f", in {escape(site.layer)}" if len(found) > 1 and site.layer else ""
    figures = "".join(
        f'<figure class="{when}" tabindex="0"><figcaption>{title}</figcaption>{picture}</figure>'
        for when, title, nodes in (
            ("before", f"Before{drawn}", site.before),
            ("after", f"After{drawn}", site.after),
        )
        if (picture := drawing.svg(nodes, f"The gate at {location}, {when}"))
    )
    return (
        f"<article><h3>{escape(location)}</h3>{_source(line)}{facts}"
        f'<div class="figures">{figures}</div>{_kernels(graph, site)}</article>'
    )


def _size(site: SiteReport) -> str:
    size = f"{site.rows} x {site.H}"
    return size if site.H == site.D else f"{size}, value {site.D} wide"


def _kernels(graph: GraphReport, site: SiteReport) -> str:
    if graph.code is None:
        return ""
    found = excerpts.kernels_of(graph.code, site)
    return "".join(map(_kernel, found))


def _kernel(kernel: excerpts.Excerpt) -> str:
    count = len(kernel.marked)
    if kernel.name.startswith("linear_sigmoid_mul_kernel"):
        what = "gatefuse's own: all of it is the gate"
    elif not count:
        what = "with a part of the gate"
    else:
        what = f"{count} {'line' if count == 1 else 'lines'} of the gate marked"
    indent = min((len(x) - len(x.lstrip()) for x in kernel.lines if x.strip()), default=0)
    lines = [
        f"<mark>{text}</mark>" if i in kernel.marked else f"<span>{text}</span>"
        for i, line in enumerate(kernel.lines[:_LONGEST])
        for text in [escape(line[indent:]) or " "]
    ]
    if (more := len(kernel.lines) - _LONGEST) > 0:
        lines.append(f"<span>… {more} more lines</span>")
    return (
        f"<details><summary>{kernel.language} kernel, {what}<code>{escape(kernel.name)}</code>"
        f'</summary><pre tabindex="0" aria-label="Generated code"><code>{"".join(lines)}'
        "</code></pre></details>"
    )


def _left_alone(graphs: Sequence[GraphReport], kind: str) -> str:
    found = [r for g in graphs for r in g.rejections if r.kind == kind]
    text = ""
    for (location, line, reason), alike in grouped(
        found, lambda r: (*line_of(r), r.reason)
    ).items():
        layers = layers_as_text([r.layer for r in alike if r.layer])
        where = ", ".join(filter(None, (f"{len(alike)} x" if len(alike) > 1 else "", layers)))
        rows = [("where", where), ("why", reason), ("what to do", advice(reason) or "")]
        facts = "".join(f"<dt>{k}</dt><dd>{_prose(v)}</dd>" for k, v in rows if v)
        text += f"<article><h3>{escape(location)}</h3>{_source(line)}<dl>{facts}</dl></article>"
    return text


def _others(graphs: Sequence[GraphReport]) -> str:
    reasons = Counter(r.reason for g in graphs for r in g.rejections if r.kind == "other")
    if not reasons:
        return ""
    total = sum(reasons.values())
    what = "1 sigmoid that cannot be a gate" if total == 1 else f"{total} that cannot be gates"
    rows = [(str(n), reason) for reason, n in reasons.most_common()]
    return f"<details><summary>{what}</summary>{_table(('sigmoids', 'why'), rows)}</details>"


def _breaks(activity: Activity) -> str:
    return "".join(
        f"<details><summary>{escape(lines[0])}{f' <small>{n} times</small>' if n > 1 else ''}"
        f'</summary><pre tabindex="0" aria-label="The reason">{escape(text)}</pre></details>'
        for reason, n in activity.breaks.items()
        if (text := without_folders(reason).strip()) and (lines := text.splitlines())
    )


def _graphs(graphs: Sequence[GraphReport]) -> str:
    head = ("graph", "phase", "fused", "left alone", "from", "error")
    return _table(
        head,
        [
            (
                g.name,
                g.phase,
                str(g.fused),
                str(len(g.rejections)),
                "Inductor's cache" if g.from_cache else "compiled",
                without_folders(g.error or ""),
            )
            for g in graphs
        ],
    )


def _versions() -> Iterator[tuple[str, str]]:
    for name in ("gatefuse", "torch", "triton"):
        try:
            yield name, str(importlib.import_module(name).__version__)
        except ImportError:
            yield name, "not installed"
    yield "python", f"{platform.python_version()}, {platform.system()} {platform.machine()}"
    device = "CPU"
    if torch.accelerator.is_available() and (kind := torch.accelerator.current_accelerator()):
        module = torch.get_device_module(kind.type)
        device = str(getattr(module, "get_device_name", lambda: kind.type)())
    yield "device", device


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, of which each row starts with its heading; without the columns that are empty, and
    empty without rows."""
    columns = [c for c in zip(head, *rows) if any(c[1:])]
    if not columns:
        return ""
    names, *cells = zip(*columns)
    top = "".join(f'<th scope="col">{escape(n)}</th>' if n else "<td></td>" for n in names)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>'
        f"{''.join(f'<td>{escape(cell)}</td>' for cell in others)}</tr>"
        for first, *others in cells
    )
    top = f"<thead><tr>{top}</tr></thead>" if any(names) else ""
    return f'<div class="wide" tabindex="0"><table>{top}<tbody>{body}</tbody></table></div>'


def _source(line: str | None) -> str:
    return (
        f'<pre tabindex="0" aria-label="Source"><code>{escape(line)}</code></pre>' if line else ""
    )


def _prose(text: str) -> str:
    """Text in which `backticks` set off code."""
    parts = escape(text).split("`")
    return "".join(f"<code>{p}</code>" if i % 2 else p for i, p in enumerate(parts))
