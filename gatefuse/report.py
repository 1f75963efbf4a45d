"""What fired, what did not, and why: a tree of plain dataclasses.

Compilations report to every :class:`Report` that is open at the time (:func:`record`). A graph that
Inductor takes from its cache never reaches the pass; its fused sites are then counted by the
counters that Inductor stores with the cached code.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.exc import ShortenTraceback
from torch.fx import Graph, GraphModule, Node

from gatefuse import compat, settings

__all__ = [
    "FusionError",
    "GraphReport",
    "RejectionReport",
    "Report",
    "SiteReport",
    "record",
]

log = logging.getLogger("gatefuse")

COUNTERS = {
    "fused": "gatefuse_fused",
    "inline": "gatefuse_inline",
    "kernel": "gatefuse_kernel",
}
"""Keys of ``torch._dynamo.utils.counters["inductor"]``. Inductor stores what a compilation adds to
them with the compiled code, and adds it again when it loads that code from a cache."""


class FusionError(ShortenTraceback):
    """Fewer sites were fused than ``expect`` demands. A RuntimeError.

    Of a kind that Dynamo and Inductor pass on instead of wrapping.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message, first_useful_frame=None)


@dataclass
class SiteReport:
    """One fused gate. rows, H and D are sizes as text, for they may be symbolic."""

    node: str
    location: str | None
    rows: str
    H: str
    D: str
    dtype: str
    has_bias: bool
    has_addend: bool
    keeps_logit: bool
    placement: str | None = None
    placement_reason: str = ""
    key: str = field(default="", repr=False)


@dataclass
class RejectionReport:
    """A sigmoid that stayed as it was, and why."""

    node: str
    location: str | None
    reason: str


@dataclass
class GraphReport:
    """One compiled graph.

    phase: ``"inference"``, ``"forward"``, ``"backward"``; ``"subgraph"`` for the body of a
    higher-order operator, such as a branch; ``"unknown"`` for a graph from a cache.
    before, after: readable code of the graph around the pass, where something was fused.
    """

    name: str
    phase: str
    from_cache: bool = False
    fused: int = 0
    sites: list[SiteReport] = field(default_factory=list)
    rejections: list[RejectionReport] = field(default_factory=list)
    before: str | None = None
    after: str | None = None
    error: str | None = None


@dataclass
class Report:
    """What gatefuse did to the graphs compiled while this report was open.

    note: why it fuses nothing in this process, if so.
    """

    graphs: list[GraphReport] = field(default_factory=list)
    note: str | None = None

    @property
    def fused(self) -> int:
        """Fused sites of all graphs, those from a cache included."""
        return sum(g.fused for g in self.graphs)

    @property
    def sites(self) -> list[SiteReport]:
        """The fused gates of all graphs; those of a graph from a cache are counted, not listed."""
        return [s for g in self.graphs for s in g.sites]

    @property
    def rejections(self) -> list[RejectionReport]:
        """Every sigmoid that was left alone, with the reason."""
        return [r for g in self.graphs for r in g.rejections]

    @property
    def from_cache(self) -> bool:
        """Whether any graph came from Inductor's cache."""
        return any(g.from_cache for g in self.graphs)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-serialisable dicts and lists, graph code left out."""
        result: dict[str, Any] = {"fused": self.fused, "note": self.note, "graphs": []}
        for g in self.graphs:
            d = asdict(g)
            del d["before"], d["after"]
            for s in d["sites"]:
                del s["key"]
            result["graphs"].append(d)
        return result

    def save(self, directory: str | Path) -> Path:
        """Write ``report.json`` and each graph before and after its rewrite; returns the folder.

        Each file is written whole or not at all, and never through a link that stands in its place.
        Raises OSError, also where ``directory`` itself is a link that leads nowhere.
        """
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / "report.json", json.dumps(self.to_dict(), indent=1))
        for g in self.graphs:
            for stage, text in (("before", g.before), ("after", g.after)):
                if text is not None:
                    _write(folder / f"{g.name}.{stage}.py", text)
        return folder

    def __str__(self) -> str:
        lines = [f"gatefuse: {self.fused} sites fused in {len(self.graphs)} graphs"]
        if self.note:
            lines.append(f"  {self.note}")
        for g in self.graphs:
            if g.from_cache:
                lines.append(f"{g.name}: from Inductor's cache, {g.fused} fused")
                continue
            lines.append(f"{g.name} ({g.phase}): {g.fused} fused")
            if g.error:
                lines.append(f"  left unfused after an error: {g.error}")
            rows: list[tuple[str, ...]] = [
                (
                    s.location or s.node,
                    f"{s.rows} x {s.H} -> {s.D}" if s.H != s.D else f"{s.rows} x {s.H}",
                    s.dtype,
                    "".join(
                        f" +{what}"
                        for what, present in (
                            ("bias", s.has_bias),
                            ("addend", s.has_addend),
                            ("logit", s.keeps_logit),
                        )
                        if present
                    ).strip(),
                    f"{s.placement}: {s.placement_reason}" if s.placement else "not lowered",
                )
                for s in g.sites
            ]
            lines += [f"  {row}" for row in _columns(rows)]
            reasons = Counter(r.reason for r in g.rejections)
            for reason, n in reasons.most_common():
                first = next(r for r in g.rejections if r.reason == reason)
                where = f" (first: {first.location})" if first.location else ""
                lines.append(f"  left alone, {n} x: {reason}{where}")
        return "\n".join(lines)


def _write(path: Path, text: str) -> None:
    # A new file, under a name that did not exist, takes the place of whatever is at the path.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text + "\n")
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def _umask() -> int:
    os.umask(mask := os.umask(0o077))
    return mask


def dump(graph: GraphReport, directory: str | Path) -> None:
    """Save one graph's report in a folder of its own, which must not be a link (OSError)."""
    folder = Path(directory) / f"{os.getpid()}.{graph.name}"
    if folder.is_symlink():
        raise OSError(f"{folder.name} is a link")
    Report([graph]).save(folder)


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in rows]


def location_of(node: Node) -> str | None:
    """Where the user's source made a node: ``"file.py:12, in forward"``."""
    trace = node.meta.get("stack_trace")
    if not trace:
        return None
    frames = [line.strip() for line in trace.splitlines() if line.strip().startswith("File ")]
    if not frames:
        return None
    try:
        path, line, *scope = frames[-1].removeprefix("File ").split(", ")
        where = f"{Path(path.strip(chr(34))).name}:{line.removeprefix('line ')}"
    except ValueError:
        return None
    return ", ".join([where, *scope])


_lock = threading.Lock()
_open: list[_Recorder] = []
_ours: ContextVar[tuple[_Recorder, ...]] = ContextVar("gatefuse_reports", default=())
"""Of the open reports, those of this thread (of this task, in asyncio)."""


def _listening(recorder: _Recorder) -> bool:
    """Whether what this thread compiles belongs into the report: in the thread that opened it, and
    in autograd's own threads, which compile a backward for whoever calls it."""
    foreign = isinstance(threading.current_thread(), threading._DummyThread)
    return foreign or recorder in _ours.get()


class _Recorder:
    """A report that is being filled, and the counters it has accounted for."""

    def __init__(self) -> None:
        self.report = Report()
        self.counted = _counted()

    def add(self, graph: GraphReport) -> None:
        if _listening(self):
            self.report.graphs.append(graph)
        self.counted["fused"] += graph.fused

    def absorb_cached(self) -> None:
        """Turn fused sites that were counted, but not reported by the pass, into a graph."""
        now = _counted()
        if not _listening(self):
            self.counted = now
            return
        missing = now["fused"] - self.counted["fused"]
        if missing < 0:  # the counters were cleared meanwhile
            missing = now["fused"]
        if missing > 0:
            name = f"graph_{len(self.report.graphs)}"
            self.report.graphs.append(GraphReport(name, "unknown", from_cache=True, fused=missing))
        self.counted = now


def _counted() -> dict[str, int]:
    from torch._dynamo.utils import counters

    return {name: counters["inductor"][key] for name, key in COUNTERS.items()}


def count(name: str, n: int = 1) -> None:
    """Add to one of gatefuse's counters."""
    from torch._dynamo.utils import counters

    counters["inductor"][COUNTERS[name]] += n


def recording() -> bool:
    """Whether any report is open for what this thread compiles."""
    with _lock:
        return any(map(_listening, _open))


def add_graph(graph: GraphReport) -> None:
    """Tell the open reports of a graph that the pass has seen, and count its sites."""
    with _lock:
        for recorder in _open:
            recorder.absorb_cached()
        count("fused", graph.fused)
        for recorder in _open:
            recorder.add(graph)


def note_placement(key: str, placement: str, reason: str) -> None:
    """Tell every open report what became of the site with this key."""
    count(placement)
    with _lock:
        for recorder in _open:
            for site in recorder.report.sites:
                if site.key == key:
                    site.placement, site.placement_reason = placement, reason


@contextlib.contextmanager
def record() -> Iterator[Report]:
    """Yields a :class:`Report` that fills as this thread compiles graphs inside the block.

    Enables nothing by itself: it tells what a backend, an option or :func:`gatefuse.enable` does.
    What other threads of the program compile is in reports of their own.
    """
    from torch._dynamo.callback import callback_handler

    recorder = _Recorder()
    recorder.report.note = compat.unsupported_reason()
    if settings.disabled_by_environment():
        recorder.report.note = "GATEFUSE_DISABLE is set"

    def compiled(_: Any) -> None:
        with _lock:
            recorder.absorb_cached()

    with _lock:
        _open.append(recorder)
    token = _ours.set((*_ours.get(), recorder))
    callback_handler.register_end_callback(compiled)
    try:
        yield recorder.report
    finally:
        with contextlib.suppress(ValueError):  # torch._dynamo.reset() drops every callback
            callback_handler.remove_end_callback(compiled)
        with _lock:
            _open.remove(recorder)
            recorder.absorb_cached()
        with contextlib.suppress(ValueError):  # ended in another context
            _ours.reset(token)


def graphs_wanted() -> bool:
    """Whether somebody looks at torch's graph logging: a debug log, or depyf (in vLLM as well),
    which puts code of its own into torch's function."""
    from torch._dynamo import utils

    code = getattr(utils.lazy_format_graph_code, "__code__", None)
    of_torch = code is not None and code.co_filename.startswith(os.path.dirname(torch.__file__))
    return log.isEnabledFor(logging.DEBUG) or not of_torch


def readable(graph: Graph, name: str) -> str | None:
    """Code of the graph, or None where it cannot be shown; passed to torch's graph logging."""
    from torch._dynamo import utils

    owner = graph.owning_module
    try:
        module = GraphModule(torch.nn.Module() if owner is None else owner, graph)
        log.debug("%s", utils.lazy_format_graph_code(name.replace(" ", "_"), module))
        text = module.print_readable(
            print_output=False, include_stride=True, include_device=True, expanded_def=True
        )
    except Exception:
        log.warning("gatefuse: the graph cannot be shown", exc_info=True)
        return None
    finally:
        graph.owning_module = owner  # making the module has changed it
    # The source's lines are told by the names of their files, not by the user's folders.
    text = re.sub(r"(?m)^(\s*# File: )\S*/", r"\1", text)
    return f"# {name}\n{text}"
