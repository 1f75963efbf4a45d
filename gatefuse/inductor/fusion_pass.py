"""The graph pass: rewrites each gate to one node of the op, and records what it did.

Matches:         mm / addmm / mv / bmm / sum(mul) -> [add bias] -> sigmoid -> mul(value) -> [add]
Rewrites to:     gatefuse.linear_sigmoid_mul(input, weight, value, bias, addend)
Left unchanged:  everything else; see :mod:`gatefuse.inductor.match_gate` for the reasons
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, GraphModule, Node

from gatefuse import compat, recording, settings, stored
from gatefuse.inductor.drawn_nodes import drawn_nodes
from gatefuse.inductor.gradient_rewriter import rewrite_gradients
from gatefuse.inductor.match_gate import Rejection, Site, find_sites
from gatefuse.inductor.match_linear import LOGIT_IS_INPUT
from gatefuse.inductor.match_sigmoid import find_sigmoids
from gatefuse.inductor.node_order import is_sorted, put_back, sort
from gatefuse.inductor.rewriter import META_KEY, DifferentResult, Rewriter
from gatefuse.origin import origin_of
from gatefuse.records import GraphReport, RejectionReport, SiteReport
from gatefuse.report import FusionError, Report
from gatefuse.settings import Options

__all__ = ["GateFusionPass", "sources_hash"]

log = logging.getLogger("gatefuse")
_graph_numbers = itertools.count()


@functools.cache
def sources_hash(folder: Path) -> str:
    """Identifies the modules of a folder of gatefuse's, for cache keys."""
    return get_hash_for_files(tuple(map(str, sorted(folder.glob("*.py"))))).hex()


def _id_of_sources() -> str:
    here = Path(__file__).parent
    return f"{sources_hash(here)} {sources_hash(here.parent)}"


class GateFusionPass(CustomGraphPass):
    """Inductor post-grad pass (either hook) that fuses the gates of a graph.

    given: those of the options that were set in code, which win over another's where two ways of
    turning the pass on meet; by default those that differ from the default. Picklable, holds no
    graph and no module; equal to another pass with the same options.
    """

    def __init__(
        self, options: Options | None = None, given: Mapping[str, Any] | None = None
    ) -> None:
        self.options = Options() if options is None else options
        default = asdict(Options())
        own = {k: v for k, v in asdict(self.options).items() if v != default[k]}
        self.given = own if given is None else dict(given)
        self.ended = False
        """Whether the block that put it on the hook has ended."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GateFusionPass) and other.options == self.options

    def __hash__(self) -> int:
        return hash((GateFusionPass, self.options))

    def __repr__(self) -> str:
        return f"GateFusionPass({self.options})"

    def uuid(self) -> str:
        """Identifies sources and options, for Inductor's cache key."""
        recording.watch_for_dumps()  # Inductor asks for the id before it looks into its cache
        off = settings.disabled_by_environment() or compat.unsupported_reason() is not None
        return f"gatefuse {_id_of_sources()} {self.options!r} off={off}"

    def __call__(self, graph: Graph) -> None:
        """Fuse the gates of a graph in place; FusionError where they are fewer than ``expect``."""
        if settings.disabled_by_environment():
            return
        if (reason := compat.unsupported_reason()) is not None:
            compat.warn_unsupported(reason)
            return
        try:
            # Not before: they import internals of Inductor that another PyTorch may not have.
            from gatefuse.inductor import cost_model, lowering

            lowering.register()
            phase = compat.graph_phase()
        except Exception as e:
            compat.warn_unsupported(f"Inductor looks different here: {type(e).__name__}: {e}")
            return
        entry = GraphReport(f"graph_{next(_graph_numbers)}_{phase}", phase)
        order = list(graph.nodes)
        try:
            if next(find_sigmoids(graph), None) is not None and not is_sorted(graph):
                sort(graph)
            found, rejections = find_sites(graph)
        except Exception as e:  # a graph nobody foresaw compiles unfused
            put_back(order)
            entry.error = f"{type(e).__name__}: {e}"
            log.warning(
                "gatefuse: matching failed, the graph is left as it is: %s",
                entry.error,
                exc_info=True,
            )
            found, rejections = [], []
        if phase == "backward":
            # A gate's derivative has its sigmoid, of a logit that the forward has kept.
            rejections = [r for r in rejections if r.reason != LOGIT_IS_INPUT]
        entry.rejections = [_rejection_report(r) for r in rejections]
        sites = []
        for site in found:
            reason = cost_model.reason_not_to_fuse(site, self.options)
            if reason is None:
                sites.append(site)
            else:
                entry.rejections.append(_rejection_report(Rejection(site.sigmoid, reason)))
        dumped = settings.dump_directory() is not None
        wanted = dumped or recording.recording() or recording.graphs_wanted()
        keep_text = bool(sites) and wanted
        if keep_text:
            entry.before = recording.readable(graph, f"gatefuse before {entry.name}")
        self._rewrite(graph, sites, entry)
        entry.fused = len(entry.sites)
        try:
            entry.gradients = rewrite_gradients(graph, self.options)
        except Exception:
            log.warning("gatefuse: gradients are left as they are", exc_info=True)
        if entry.sites or entry.rejections or entry.gradients:
            entry.id = stored.identify(entry, graph)
        if keep_text:
            entry.after = recording.readable(graph, f"gatefuse after {entry.name}")
        recording.add_graph(entry)
        log.info(
            "gatefuse: %s: %d fused, %d left alone",
            entry.name,
            entry.fused,
            len(entry.rejections),
        )
        if phase in ("inference", "forward") and self.options.expect > 0:
            fused = entry.fused + _fused_in_subgraphs(graph)
            if fused < self.options.expect:
                raise FusionError(
                    f"gatefuse: expected at least {self.options.expect} fused gates in the graph, "
                    f"fused {fused}.\n{Report([entry])}"
                )
        if entry.sites and (dumped or recording.recording()):
            recording.keep_code(entry)

    def _rewrite(self, graph: Graph, sites: list[Site], entry: GraphReport) -> None:
        """Replace the sites and note them in ``entry``; the graph stays as it was on an error."""
        rewriter = Rewriter(graph, self.options)
        for site in sites:
            key = f"{entry.name}/{site.sigmoid.name}/{os.getpid()}"
            try:
                try:
                    new = rewriter.rewrite(site, key)
                except DifferentResult:
                    if site.anchor is site.mul:
                        raise
                    site = replace(site, anchor=site.mul, addend=None, value_views=())
                    new = rewriter.rewrite(site, key)
            except Exception as e:
                if isinstance(e, DifferentResult):
                    reason = str(e)
                else:
                    log.warning("gatefuse: a site is left as it is", exc_info=True)
                    reason = f"could not be rewritten: {type(e).__name__}: {e}"
                entry.rejections.append(_rejection_report(Rejection(site.sigmoid, reason)))
                continue
            report = _site_report(site, new, key)
            report.before, report.after = drawn_nodes(site, rewriter.replaced)
            entry.sites.append(report)
        try:
            rewriter.finish()
        except Exception as e:
            rewriter.undo()
            entry.error = f"{type(e).__name__}: {e}"
            log.warning(
                "gatefuse: rewriting failed, the graph is left as it is: %s",
                entry.error,
                exc_info=True,
            )
            entry.sites = []


def _fused_in_subgraphs(graph: Graph) -> int:
    """Op nodes in the bodies of the graph's higher-order operators."""
    fused = 0
    for name in {node.target for node in graph.find_nodes(op="get_attr")}:
        module = getattr(graph.owning_module, name, None)
        if isinstance(module, GraphModule):
            nodes = module.graph.nodes
            fused += sum(META_KEY in n.meta for n in nodes) + _fused_in_subgraphs(module.graph)
    return fused


def _rejection_report(rejection: Rejection) -> RejectionReport:
    node, origin = rejection.node, origin_of(rejection.node)
    return RejectionReport(
        node.name, origin.location, rejection.reason, rejection.kind, origin.line, origin.layer
    )


def _site_report(site: Site, new: Node, key: str) -> SiteReport:
    x, v = site.input.meta["val"], site.value.meta["val"]
    origin = origin_of(site.sigmoid, site.mul)
    return SiteReport(
        node=new.name,
        location=origin.location,
        line=origin.line,
        layer=origin.layer,
        rows=str(math.prod(x.shape[:-1])),
        H=str(x.shape[-1]),
        D=str(v.shape[-1]),
        dtype=str(site.anchor.meta["val"].dtype).removeprefix("torch."),
        has_bias=site.bias is not None,
        has_addend=site.addend is not None,
        keeps_logit=site.keeps_logit,
        key=key,
    )
