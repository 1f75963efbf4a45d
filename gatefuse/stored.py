"""Reports that lie beside Inductor's cached code: what is known of a graph that comes from there.

Inductor stores what a compilation added to its counters with the compiled code. One of them names
the graph; a file of that name, in a folder of gatefuse's in Inductor's cache, has its report.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from torch.fx import Graph

from gatefuse.records import GraphReport
from gatefuse.report import graph_from_dict, write

__all__ = ["PREFIX", "graph_caches_off", "identify", "load", "store"]

PREFIX = "gatefuse_graph_"
"""Of the counters that name a graph."""


def identify(entry: GraphReport, graph: Graph) -> str:
    """A name for the graph that is the same in each process."""
    text = [entry.phase, repr(entry.sites), repr(entry.rejections), repr(entry.gradients)]
    text += [f"{n.name} {n.target}" for n in graph.nodes]
    return PREFIX + hashlib.sha256("\n".join(text).encode()).hexdigest()[:16]


def _folder() -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir()) / "gatefuse"


def _caching() -> bool:
    from torch._functorch import config as functorch
    from torch._inductor import config

    if config.force_disable_caches:
        return False
    return bool(config.fx_graph_cache or functorch.enable_autograd_cache)


@contextlib.contextmanager
def graph_caches_off() -> Iterator[None]:
    """Every graph is compiled, and none kept; what a compiler made of a kernel's text still is."""
    from torch._functorch import config as functorch
    from torch._inductor import config

    # Not force_disable_caches, which makes a folder for each graph and leaves it there.
    with (
        config.patch(fx_graph_cache=False, fx_graph_remote_cache=False),
        functorch.patch(enable_autograd_cache=False, enable_remote_autograd_cache=False),
    ):
        yield


def store(entry: GraphReport) -> None:
    """Keep a graph's report; nothing happens where that is not possible."""
    if not entry.id or not _caching():
        return
    with contextlib.suppress(OSError):
        folder = _folder()
        folder.mkdir(parents=True, exist_ok=True)
        if not folder.is_symlink():
            kept = asdict(replace(entry, sites=[replace(s, key="") for s in entry.sites]))
            write(folder / f"{entry.id}.json", json.dumps(kept))


def load(id: str) -> GraphReport | None:
    """The report of a graph by its name, or None."""
    path = _folder() / f"{id}.json"
    try:
        if path.parent.is_symlink() or path.is_symlink():
            return None
        graph = graph_from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError):
        return None
    graph.from_cache = True
    return graph
