"""What fired, what did not, and why."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch._dynamo.exc import ShortenTraceback

from gatefuse import page, summary
from gatefuse.records import (
    Activity,
    DrawnNode,
    GradientReport,
    GraphReport,
    ModelGates,
    RejectionReport,
    SiteReport,
)

__all__ = ["FusionError", "Report", "graph_from_dict", "write"]


class FusionError(ShortenTraceback):
    """Fewer sites were fused than ``expect`` demands. A RuntimeError.

    Of a kind that Dynamo and Inductor pass on instead of wrapping.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message, first_useful_frame=None)


@dataclass
class Report:
    """What gatefuse did to the graphs compiled while this report was open.

    note: why it fuses nothing in this process, if so. model: the gates of the model, where the
    report is one of a model (:func:`gatefuse.explain`, :func:`gatefuse.scan`). activity: what
    PyTorch compiled meanwhile, with gatefuse or without.
    """

    graphs: list[GraphReport] = field(default_factory=list)
    note: str | None = None
    model: ModelGates | None = None
    activity: Activity = field(default_factory=Activity)

    @property
    def fused(self) -> int:
        """Fused sites of all graphs, those from a cache included."""
        return sum(g.fused for g in self.graphs)

    @property
    def gates(self) -> int:
        """The M of "N of M gates fused": the model's gates, where it is known; else the fused sites
        and those gates of the graphs that were left alone."""
        return summary.gates_and_fused(self.graphs, self.model)[0]

    @property
    def verdict(self) -> str:
        """The first line, without the name: ``"48 of 48 gates fused in 1 graph"``."""
        return summary.verdict(self.graphs, self.model, self.activity, self.note)

    @property
    def sites(self) -> list[SiteReport]:
        """The fused gates of all graphs."""
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
        """The report as JSON-serialisable dicts and lists; code and nodes of graphs left out."""
        result: dict[str, Any] = {
            "verdict": self.verdict,
            "fused": self.fused,
            "gates": self.gates,
            "note": self.note,
            "model": None if self.model is None else asdict(self.model),
            "activity": asdict(self.activity),
            "graphs": [],
        }
        for g in self.graphs:
            d = asdict(g)
            del d["before"], d["after"], d["code"]
            for s in d["sites"]:
                del s["key"], s["before"], s["after"]
            result["graphs"].append(d)
        return result

    def save(self, directory: str | Path) -> Path:
        """Write ``report.json``, the page ``report.html``, and of each graph with a fused gate the
        code before and after its rewrite and what Inductor generated; returns the folder.

        Each file is written whole or not at all, and never through a link that stands in its place.
        Raises OSError, also where ``directory`` itself is a link that leads nowhere.
        """
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / "report.json", json.dumps(self.to_dict(), indent=1))
        self.save_page(folder / "report.html")
        for g in self.graphs:
            for stage, text in (("before", g.before), ("after", g.after), ("code", g.code)):
                if text is not None:
                    write(folder / f"{g.name}.{stage}.py", text)
        return folder

    def save_page(self, path: str | Path) -> Path:
        """Write the report as one HTML page that needs nothing else: no network, no script; returns
        its path. Raises OSError."""
        path = Path(path)
        write(path, page.html(self.graphs, self.model, self.activity, self.note))
        return path

    def __str__(self) -> str:
        return summary.summary(self.graphs, self.model, self.activity, self.note)


def graph_from_dict(values: Mapping[str, Any]) -> GraphReport:
    """What ``dataclasses.asdict`` made of a graph; TypeError on a field that is not one."""
    graph = GraphReport(**values)
    graph.sites = [SiteReport(**s) for s in values["sites"]]
    for site, of_site in zip(graph.sites, values["sites"]):
        site.before = [DrawnNode(**n) for n in of_site["before"]]
        site.after = [DrawnNode(**n) for n in of_site["after"]]
    graph.gradients = [GradientReport(**g) for g in values.get("gradients", ())]
    graph.rejections = [RejectionReport(**r) for r in values["rejections"]]
    return graph


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all, in place of a link if one has its name. Raises OSError."""
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
