"""The graph pass: rewrites each gate to one node of the op, and records what it did.

Matches:         mm / addmm / mv / bmm / sum(mul) -> [add bias] -> sigmoid -> mul(value) -> [add]
Rewrites to:     gatefuse.linear_sigmoid_mul(input, weight, bias, value, addend)
Left unchanged:  everything else; see :mod:`gatefuse.matcher` for the reasons
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import logging
import math
import operator
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, GraphModule, Node

from gatefuse import compat, report, settings
from gatefuse.matcher import Site, find_sites, logit_shape_op, site_dtype
from gatefuse.nodes import known, same_shape
from gatefuse.settings import Options

__all__ = ["GateFusionPass", "PassSequence"]

log = logging.getLogger("gatefuse")
aten = torch.ops.aten
prims = torch.ops.prims

META_KEY = "gatefuse"
"""Key of ``node.meta`` under which an op node carries a dict for the lowering."""

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
        rewriter = _Rewriter(graph, self.options)
        for site in sites:
            key = f"{entry.name}/{site.sigmoid.name}/{os.getpid()}"
            try:
                try:
                    new = rewriter.rewrite(site, key)
                except _DifferentResult:
                    if site.addend is None:
                        raise
                    site = replace(site, anchor=site.mul, addend=None, value_views=())
                    new = rewriter.rewrite(site, key)
            except Exception as e:
                if isinstance(e, _DifferentResult):
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


class _Rewriter:
    """Replaces sites by op nodes. Erases nothing before :meth:`finish`, so that all of it can be
    undone."""

    def __init__(self, graph: Graph, opts: Options) -> None:
        self.graph = graph
        self.options = opts
        self.sites: list[Site] = []
        self.new: list[Node] = []
        self.replaced: dict[Node, Node] = {}
        self.users: list[tuple[Node, Node, list[Node]]] = []
        self.order: list[Node] = []

    def rewrite(self, site: Site, key: str) -> Node:
        """Returns the op node; raises where the result would not be what it replaces, and leaves
        the site as it was."""
        before = len(self.new)
        try:
            with self.graph.inserting_before(site.anchor):
                op, result, logit = self._insert(site)
        except Exception:
            self._erase_new(before)
            raise
        op.meta[META_KEY] = {
            "key": key,
            "placement": self.options.placement,
            "eager_rounding": self.options.eager_rounding,
            "logit_dtype": site.logit.meta["val"].dtype,
            "gate_dtype": site.chain[-1].meta["val"].dtype,
            "product_dtype": site.mul.meta["val"].dtype,
        }
        if logit is not None:
            self._replace(site.logit, logit)
        self._replace(site.anchor, result)
        self.sites.append(site)
        return op

    def finish(self) -> None:
        """Bring the graph in order and erase what nobody uses any more."""
        if not self.sites:
            return
        if any(site.keeps_logit for site in self.sites):
            from torch._inductor.pattern_matcher import stable_topological_sort

            self.order = list(self.graph.nodes)
            stable_topological_sort(self.graph)
        self.graph.lint()
        # The rest of a site goes with what it leads to, or stays because something else uses it.
        self._erase_unused([n for site in self.sites for n in (site.logit, site.anchor)])

    def undo(self) -> None:
        """Put the graph back, after an error before anything was erased."""
        for old, new, users in reversed(self.users):
            for user in users:
                user.replace_input_with(new, old)
        for node, following in itertools.pairwise(self.order):
            node.append(following)
        self._erase_new(0)

    def _erase_new(self, start: int) -> None:
        for node in reversed(self.new[start:]):
            self.graph.erase_node(node)
        del self.new[start:]

    def _erase_unused(self, stack: list[Node]) -> None:
        """Erase nodes that nobody uses, and what only they needed: views, conversions and the like,
        no inputs of the graph."""
        erased = set[Node]()
        while stack:
            node = stack.pop()
            if node.users or node in erased or node.op != "call_function" or node.is_impure():
                continue
            erased.add(node)
            sources = node.all_input_nodes
            self.graph.erase_node(node)
            stack.extend(sources)

    def _replace(self, old: Node, new: Node) -> None:
        self.users.append((old, new, old.replace_all_uses_with(new)))
        self.replaced[old] = new

    def _now(self, node: Node) -> Node:
        """The node that stands for ``node`` after the rewrites so far."""
        while node in self.replaced:
            node = self.replaced[node]
        return node

    def _call(self, site: Site, target: Any, *args: Any) -> Node:
        """A new node with shape metadata, attributed to the source line of the site."""
        node = self.graph.call_function(target, args)
        self.new.append(node)
        for name in ("stack_trace", "nn_module_stack", "source_fn_stack"):
            if name in site.anchor.meta:
                node.meta[name] = site.anchor.meta[name]
        if isinstance(target, torch._ops.OpOverload):
            node.meta["original_aten"] = target  # Inductor names its kernels by it
        mode = getattr(site.anchor.meta["val"], "fake_mode", None)
        shape_env = getattr(mode, "shape_env", None)
        with contextlib.ExitStack() as stack:
            if mode is not None:
                stack.enter_context(mode)
            if shape_env is not None:
                stack.enter_context(shape_env.suppress_guards())
            node.meta["val"] = target(*torch.fx.map_arg(args, lambda n: n.meta["val"]))
        return node

    def _insert(self, site: Site) -> tuple[Node, Node, Node | None]:
        """Insert the op and what it needs: (op, node of the result, node of the logit or None)."""
        call = functools.partial(self._call, site)
        input, weight, value = (self._now(n) for n in (site.input, site.weight, site.value))
        bias = None if site.bias is None else self._now(site.bias)
        addend = None if site.addend is None else self._now(site.addend)
        if weight.meta["val"].dim() != 2 or not known(weight.meta["val"].shape[0] == 1):
            weight = call(aten.reshape.default, weight, [1, -1])
        if bias is not None and bias.meta["val"].dim() != 1:
            bias = call(aten.reshape.default, bias, [1])

        # The op's dtype is its operands' promotion; conversions that were peeled off the operands
        # may have made the result wider, explicit ones behind the gate may have made it narrower.
        wanted = site.anchor.meta["val"].dtype
        given = torch.promote_types(site_dtype(site), wanted)
        if given != site_dtype(site):
            value = call(prims.convert_element_type.default, value, wanted)
        for view in site.value_views:
            args = (self._now(a) if isinstance(a, Node) else a for a in view.args[1:])
            value = call(view.target, value, *args)

        operands = (input, weight, bias, value, addend)
        logit: Node | None = None
        if site.keeps_logit:
            dtype = site.logit.meta["val"].dtype
            op = call(torch.ops.gatefuse.linear_sigmoid_mul_logit.default, *operands, dtype)
            result = call(operator.getitem, op, 0)
            logit = call(operator.getitem, op, 1)
            shape_op = logit_shape_op(site.logit, site.input)
            assert shape_op is not None
            if shape_op[0] is not aten.alias.default:
                logit = call(shape_op[0], logit, *shape_op[1])
            _check_same(logit.meta["val"], site.logit.meta["val"], strides=False)
        else:
            result = op = call(torch.ops.gatefuse.linear_sigmoid_mul.default, *operands)
        if given != wanted:
            result = call(prims.convert_element_type.default, result, wanted)
        _check_same(result.meta["val"], site.anchor.meta["val"])
        return op, result, logit


class _DifferentResult(Exception):
    """The op's result cannot be shown to look like what it would replace."""


def _check_same(new: torch.Tensor, old: torch.Tensor, strides: bool = True) -> None:
    """Raise unless dtype, shape and (where a size is not 1) strides of the two are equal.

    Strides of a logit do not count: those of a padded product are Inductor's own doing.
    """
    if new.dtype != old.dtype:
        raise _DifferentResult(f"the op would return {new.dtype}, not {old.dtype}")
    if not same_shape(new.shape, old.shape):
        raise _DifferentResult(
            f"shape {tuple(new.shape)} of the op's result cannot be shown to be {tuple(old.shape)}"
        )
    for size, a, b in zip(new.shape, new.stride(), old.stride()):
        if strides and not known(size == 1) and not known(a == b):
            raise _DifferentResult(
                f"strides {new.stride()} of the op's result cannot be shown to be {old.stride()}"
            )
