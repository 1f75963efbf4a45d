"""The graph pass: rewrites each gate to one node of the op, and records what it did.

Matches:         mm / addmm / mv / bmm / sum(mul) -> [add bias] -> sigmoid -> mul(value) -> [add]
Rewrites to:     gatefuse.linear_sigmoid_mul(input, weight, bias, value, addend)
Left unchanged:  everything else; see :mod:`gatefuse.matcher` for the reasons
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import logging
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, GraphModule, Node

from gatefuse import compat, report, settings
from gatefuse.matcher import Site, find_sites
from gatefuse.nodes import known
from gatefuse.rewriter import META_KEY, DifferentResult, Rewriter
from gatefuse.settings import Options

__all__ = ["GateFusionPass", "PassSequence"]

log = logging.getLogger("gatefuse")
_graph_numbers = itertools.count()


_SOURCES = (
    "choices",
    "compat",
    "fusion_pass",
    "kernels",
    "linear",
    "lowering",
    "matcher",
    "nodes",
    "ops",
    "order",
    "rewriter",
    "settings",
)
"""Modules that decide what code is generated."""


@functools.cache
def _sources_hash() -> str:
    digest = hashlib.sha256()
    for name in _SOURCES:
        digest.update(Path(__file__).with_name(f"{name}.py").read_bytes())
    return digest.hexdigest()


class GateFusionPass(CustomGraphPass):
    """Inductor post-grad pass (either hook) that fuses the gates of a graph.

    Picklable, holds no graph and no module; equal to another pass with the same options.
    """

    def __init__(self, options: Options | None = None) -> None:
        self.options = Options() if options is None else options

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GateFusionPass) and other.options == self.options

    def __hash__(self) -> int:
        return hash((GateFusionPass, self.options))

    def __repr__(self) -> str:
        return f"GateFusionPass({self.options})"

    def uuid(self) -> str:
        """Identifies sources and options, for Inductor's cache key."""
        off = settings.disabled_by_environment() or compat.unsupported_reason() is not None
        return f"gatefuse {_sources_hash()} {self.options!r} off={off}"

    def __call__(self, graph: Graph) -> None:
        if settings.disabled_by_environment():
            return
        if (reason := compat.unsupported_reason()) is not None:
            compat.warn_unsupported(reason)
            return
        from gatefuse import lowering

        lowering.register()
        phase = compat.graph_phase(graph)
        entry = report.GraphReport(f"graph_{next(_graph_numbers)}_{phase}", phase)
        try:
            sites, rejections = find_sites(graph)
        except Exception as e:  # a graph nobody foresaw compiles unfused
            log.warning("gatefuse: matching failed, the graph is left as it is", exc_info=True)
            entry.error = f"{type(e).__name__}: {e}"
            sites, rejections = [], []
        entry.rejections = [_rejection_report(r.node, r.reason) for r in rejections]
        for site in list(sites):
            if (unprofitable := _unprofitable(site, self.options)) is not None:
                sites.remove(site)
                entry.rejections.append(_rejection_report(site.sigmoid, unprofitable))
        dump = settings.dump_directory()
        keep_text = bool(sites) and (dump is not None or report.recording() or _graphs_wanted())
        if keep_text:
            entry.before = readable(graph, f"gatefuse before {entry.name}")
        self._rewrite(graph, sites, entry)
        entry.fused = len(entry.sites)
        if keep_text:
            entry.after = readable(graph, f"gatefuse after {entry.name}")
        report.add_graph(entry)
        log.info(
            "gatefuse: %s: %d fused, %d left alone",
            entry.name,
            entry.fused,
            len(entry.rejections),
        )
        if dump is not None:
            try:
                report.Report([entry]).save(Path(dump) / f"{os.getpid()}.{entry.name}")
            except OSError as e:
                log.warning("gatefuse: GATEFUSE_DUMP: %s", e)
        if phase in ("inference", "forward") and self.options.expect > 0:
            fused = entry.fused + _fused_in_subgraphs(graph)
            if fused < self.options.expect:
                raise report.FusionError(
                    f"gatefuse: expected at least {self.options.expect} fused gates in the graph, "
                    f"fused {fused}.\n{report.Report([entry])}"
                )

    def _rewrite(self, graph: Graph, sites: list[Site], entry: report.GraphReport) -> None:
        """Replace the sites and note them in ``entry``; the graph stays as it was on an error."""
        rewriter = Rewriter(graph, self.options)
        for site in sites:
            key = f"{entry.name}/{site.sigmoid.name}/{os.getpid()}"
            try:
                try:
                    new = rewriter.rewrite(site, key)
                except DifferentResult:
                    if site.addend is None:
                        raise
                    site = replace(site, anchor=site.mul, addend=None, value_views=())
                    new = rewriter.rewrite(site, key)
            except Exception as e:
                if isinstance(e, DifferentResult):
                    reason = str(e)
                else:
                    log.warning("gatefuse: a site is left as it is", exc_info=True)
                    reason = f"could not be rewritten: {type(e).__name__}: {e}"
                entry.rejections.append(_rejection_report(site.sigmoid, reason))
                continue
            entry.sites.append(_site_report(site, new, key))
        try:
            rewriter.finish()
        except Exception as e:
            log.warning("gatefuse: rewriting failed, the graph is left as it is", exc_info=True)
            rewriter.undo()
            entry.error = f"{type(e).__name__}: {e}"
            entry.sites = []


class PassSequence(CustomGraphPass):
    """Several passes on a hook of Inductor's that holds one."""

    def __init__(self, passes: tuple[Callable[..., Any], ...]) -> None:
        self.passes = passes

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PassSequence) and other.passes == self.passes

    def __hash__(self) -> int:
        return hash((PassSequence, self.passes))

    def __call__(self, graph: Graph) -> None:
        for graph_pass in self.passes:
            graph_pass(graph)

    def uuid(self) -> Any:
        """The passes' own ids, or None (no caching) if any of them has none."""
        ids = [p.uuid() if isinstance(p, CustomGraphPass) else None for p in self.passes]
        return None if any(i is None for i in ids) else tuple(ids)


LARGE_RESULT = {2: 8 << 20, 4: 1 << 20}
"""Bytes of a result on the CPU, by those of an element, from which on a gate between other
generated code is not faster fused. 16-bit products of the gate's shape are slow unfused."""


def _unprofitable(site: Site, options: Options) -> str | None:
    """Why a site is better left to Inductor, or None.

    On a GPU, code for any width can neither keep a row in registers nor rely on aligned rows. In a
    decoder layer's glue on an H200 (H = 4096) it took 21 to 32 % less time than the unfused one at
    up to 256 rows and 4 to 27 % more from 1024 rows on, and one compile serves all.

    On the CPU the fused gate makes one kernel of those before and behind it. It passes over all
    rows for each step, where the kernels by themselves finish a row while it is in the cache, and
    cannot use the memory of its input for its result: up to 10 % slower, and 20 to 30 % where the
    memory is fresh (32 MiB).
    """
    if options.placement != "auto":
        return None
    x, v = site.input.meta["val"], site.value.meta["val"]
    if v.device.type != "cpu":
        static = isinstance(x.shape[-1], int) and isinstance(v.shape[-1], int)
        reason = "a width is symbolic, and fusing would be slower at many rows"
        return None if static else f"{reason}; a forced placement fuses it"
    from gatefuse.lowering import computed_by_inductor

    size = v.numel() * v.element_size()
    if known(size >= LARGE_RESULT[v.element_size()]) and computed_by_inductor(site.input):
        reason = "with a result of this size on the CPU, fusing would be slower"
        return f"{reason}; a forced placement fuses it"
    return None


def _graphs_wanted() -> bool:
    """Whether somebody looks at torch's graph logging: a debug log, or depyf (in vLLM as well),
    which puts code of its own into torch's function."""
    from torch._dynamo import utils

    code = getattr(utils.lazy_format_graph_code, "__code__", None)
    of_torch = code is not None and code.co_filename.startswith(os.path.dirname(torch.__file__))
    return log.isEnabledFor(logging.DEBUG) or not of_torch


def _fused_in_subgraphs(graph: Graph) -> int:
    """Op nodes in the bodies of the graph's higher-order operators."""
    fused = 0
    for name in {node.target for node in graph.find_nodes(op="get_attr")}:
        module = getattr(graph.owning_module, name, None)
        if isinstance(module, GraphModule):
            nodes = module.graph.nodes
            fused += sum(META_KEY in n.meta for n in nodes) + _fused_in_subgraphs(module.graph)
    return fused


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
    return f"# {name}\n{text}"


def _rejection_report(sigmoid: Node, reason: str) -> report.RejectionReport:
    return report.RejectionReport(sigmoid.name, report.location_of(sigmoid), reason)


def _site_report(site: Site, new: Node, key: str) -> report.SiteReport:
    x, v = site.input.meta["val"], site.value.meta["val"]
    return report.SiteReport(
        node=new.name,
        location=report.location_of(site.sigmoid) or report.location_of(site.mul),
        rows=str(math.prod(x.shape[:-1])),
        H=str(x.shape[-1]),
        D=str(v.shape[-1]),
        dtype=str(site.anchor.meta["val"].dtype).removeprefix("torch."),
        has_bias=site.bias is not None,
        has_addend=site.addend is not None,
        keeps_logit=site.keeps_logit,
        key=key,
    )
