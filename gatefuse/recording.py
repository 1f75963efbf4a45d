"""Fills the reports that are open while graphs are compiled.

Compilations report to every :class:`gatefuse.Report` that is open at the time (:func:`record`). A
graph that Inductor takes from its cache never reaches the pass: counters that Inductor stores with
the cached code tell of it, and the report stored beside that code is read
(:mod:`gatefuse.stored`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.fx import Graph, GraphModule

from gatefuse import compat, settings, stored
from gatefuse.origin import without_folders
from gatefuse.records import Activity, GraphReport
from gatefuse.report import Report

__all__ = [
    "COUNTERS",
    "add_graph",
    "count",
    "graphs_wanted",
    "keep_code",
    "note_placement",
    "readable",
    "record",
    "recording",
    "watch_for_dumps",
]

log = logging.getLogger("gatefuse")

COUNTERS = {
    "fused": "gatefuse_fused",
    "inline": "gatefuse_inline",
    "kernel": "gatefuse_kernel",
}
"""Keys of ``torch._dynamo.utils.counters["inductor"]``. Inductor stores what a compilation adds to
them with the compiled code, and adds it again when it loads that code from a cache."""

_lock = threading.RLock()
_open: list[_Recorder] = []
_ours: ContextVar[tuple[_Recorder, ...]] = ContextVar("gatefuse_reports", default=())
"""Of the open reports, those of this thread (of this task, in asyncio)."""

_unplaced: OrderedDict[str, GraphReport] = OrderedDict()
"""Graphs of which not every site has been lowered, by name; the newest."""


class _Recorder:
    """A report that is being filled, and the counters it has accounted for."""

    def __init__(self) -> None:
        self.report = Report()
        self.counted = _counted()

    def listening(self) -> bool:
        """Whether what this thread compiles belongs in the report: in the thread that opened it,
        and in autograd's own threads, which compile a backward for whoever calls it."""
        foreign = isinstance(threading.current_thread(), threading._DummyThread)
        return foreign or self in _ours.get()

    def add(self, graph: GraphReport) -> None:
        if self.listening():
            self.report.graphs.append(graph)
        self.counted[COUNTERS["fused"]] += graph.fused
        self.counted[graph.id] += 1

    def cached(self) -> list[GraphReport]:
        """The graphs that were counted, but not reported by the pass, since the last call."""
        now = _counted()
        if now[COUNTERS["fused"]] < self.counted[COUNTERS["fused"]]:  # cleared meanwhile
            self.counted.clear()
        new = now - self.counted
        self.counted = now
        if not self.listening():
            return []
        fused = new.pop(COUNTERS["fused"], 0)
        graphs = [g for id in new.elements() if (g := stored.load(id))]
        if (unknown := fused - sum(g.fused for g in graphs)) > 0:
            graphs.append(GraphReport("graph", "unknown", from_cache=True, fused=unknown))
        return graphs

    def absorb_cached(self) -> None:
        """Add the graphs that came from a cache."""
        for graph in self.cached():
            number = len(self.report.graphs)
            name = f"graph_{number}" + (f"_{graph.phase}" if graph.id else "")
            self.report.graphs.append(replace(graph, name=name))


class _Dumper(_Recorder):
    """Writes the graphs that come from a cache to the folder of GATEFUSE_DUMP."""

    def listening(self) -> bool:
        return True

    def add(self, graph: GraphReport) -> None:
        super().add(graph)
        self.report.graphs.clear()  # the pass dumps it

    def absorb_cached(self) -> None:
        super().absorb_cached()
        folder = settings.dump_directory()
        for graph in self.report.graphs if folder is not None else ():
            assert folder is not None
            note = None
            if graph.before is None:
                note = (
                    "from Inductor's cache, where the graphs themselves were not kept: "
                    "TORCHINDUCTOR_FORCE_DISABLE_CACHES=1 compiles anew and writes them"
                )
            dump(replace(graph, name=f"{graph.name}_cached"), folder, note)
        self.report.graphs.clear()


_dumper: _Dumper | None = None


def dump(graph: GraphReport, directory: str | Path, note: str | None = None) -> None:
    """Save one graph's report in a folder of its own, which must not be a link; warns on errors."""
    folder = Path(directory) / f"{os.getpid()}.{graph.name}"
    try:
        if folder.is_symlink():
            raise OSError(f"{folder.name} is a link")
        Report([graph], note).save(folder)
    except OSError as e:
        log.warning("gatefuse: GATEFUSE_DUMP: %s", e)


def watch_for_dumps() -> None:
    """With GATEFUSE_DUMP set, write graphs that come from a cache too, from now on."""
    global _dumper
    if settings.dump_directory() is None:
        return
    from torch._dynamo.callback import callback_handler

    with _lock:
        if _dumper is None:
            _dumper = _Dumper()
            _open.append(_dumper)
        with contextlib.suppress(ValueError):  # torch._dynamo.reset() drops every callback
            callback_handler.remove_end_callback(_absorb_for_dumps)
        callback_handler.register_end_callback(_absorb_for_dumps)


def _absorb_for_dumps(_: Any) -> None:
    with _lock:
        if _dumper is not None:
            _dumper.absorb_cached()


def _counted() -> Counter[str]:
    from torch._dynamo.utils import counters

    ours = (COUNTERS["fused"], stored.PREFIX)
    return Counter({k: n for k, n in counters["inductor"].items() if k.startswith(ours)})


def count(key: str, n: int = 1) -> None:
    """Add to one of Inductor's counters."""
    from torch._dynamo.utils import counters

    counters["inductor"][key] += n


def recording() -> bool:
    """Whether any report is open for what this thread compiles."""
    with _lock:
        return any(r.listening() for r in _open if r is not _dumper)


def add_graph(graph: GraphReport) -> None:
    """Tell the open reports of a graph that the pass has seen, and count its sites."""
    with _lock:
        for recorder in _open:
            recorder.absorb_cached()
        count(COUNTERS["fused"], graph.fused)
        if graph.id:
            count(graph.id)
        for recorder in _open:
            recorder.add(graph)
        if graph.sites:
            _unplaced[graph.name] = graph
            while len(_unplaced) > 64:
                _unplaced.popitem(last=False)
    _finished(graph)


def note_placement(key: str, placement: str, reason: str) -> None:
    """Note what became of the site with this key."""
    count(COUNTERS[placement])
    with _lock:
        graph = _unplaced.get(key.partition("/")[0])
        if graph is None:
            return
        for site in graph.sites:
            if site.key == key:
                site.placement, site.placement_reason = placement, reason
        if any(site.placement is None for site in graph.sites):
            return
        del _unplaced[graph.name]
    _finished(graph)


def _finished(graph: GraphReport) -> None:
    """Store and dump what is known, at first without placements; once all is known, add it to
    PyTorch's structured trace, which tlparse shows."""
    _save(graph)
    if all(site.placement for site in graph.sites):
        compat.trace_artifact(f"gatefuse_{graph.name}", lambda: str(Report([graph])))


def _save(graph: GraphReport) -> None:
    stored.store(graph)
    if (folder := settings.dump_directory()) is not None:
        dump(graph, folder)


@contextlib.contextmanager
def record(*, alone: bool = False) -> Iterator[Report]:
    """Yields a :class:`gatefuse.Report` that fills as this thread compiles graphs inside the block.

    Enables nothing by itself: it tells what a backend, an option or :func:`gatefuse.enable` does.
    What other threads of the program compile is in reports of their own.

    alone: nothing of it goes into the reports of surrounding blocks.
    """
    from torch._dynamo.callback import callback_handler

    recorder = _Recorder()
    report = recorder.report
    report.note = compat.unsupported_reason()
    if settings.disabled_by_environment():
        report.note = "GATEFUSE_DISABLE is set"
    before, own = _compiled(), False
    report.activity.before = before["graphs"]
    report.activity.switched_off = compat.switched_off()

    def compiled(_: Any) -> None:
        nonlocal own
        with _lock:
            if recorder.listening():
                own = True
                report.activity.hooked |= _hooked()
            else:
                report.activity.elsewhere += 1
            recorder.absorb_cached()

    with _lock:
        _open.append(recorder)
    token = _ours.set((recorder,) if alone else (*_ours.get(), recorder))
    callback_handler.register_end_callback(compiled)
    try:
        yield report
    finally:
        with contextlib.suppress(ValueError):  # torch._dynamo.reset() drops every callback
            callback_handler.remove_end_callback(compiled)
        compat.forget_output_code()  # of a compilation that ended before there was any
        with _lock:
            _open.remove(recorder)
            recorder.absorb_cached()
        with contextlib.suppress(ValueError):  # ended in another context
            _ours.reset(token)
        if own or not report.activity.elsewhere:
            _note_activity(report.activity, _compiled() - before)


def _note_activity(activity: Activity, new: Counter[str]) -> None:
    activity.graphs = new.pop("graphs", 0)
    activity.cached = max(new.pop("cached code", 0), new.pop("cached graphs", 0))
    activity.breaks = dict(new)
    activity.hooked |= _hooked()
    activity.switched_off = activity.switched_off or compat.switched_off()


def _compiled() -> Counter[str]:
    """What PyTorch has compiled so far, and its reasons for graph breaks."""
    from torch._dynamo.utils import counters

    found = Counter[str](counters["graph_break"])
    found["graphs"] = counters["stats"]["unique_graphs"]
    found["cached code"] = counters["inductor"]["fxgraph_cache_hit"]
    found["cached graphs"] = counters["aot_autograd"]["autograd_cache_hit"]
    return found


def _hooked() -> bool:
    """Whether a pass of gatefuse's is on Inductor's hooks in this thread."""
    from torch._inductor import config

    hooks = (config.post_grad_custom_pre_pass, config.post_grad_custom_post_pass)
    return any(type(hook).__module__.startswith("gatefuse.") for hook in hooks)


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
    return f"# {name}\n{without_folders(text)}"


def keep_code(graph: GraphReport) -> None:
    """Keep what Inductor generates next in this thread as the graph's code."""

    def see(code: str) -> None:
        if "linear_sigmoid_mul" not in code:  # of another graph
            return
        graph.code = without_folders(code)
        _save(graph)

    compat.on_output_code(see)
