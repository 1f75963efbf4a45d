"""Replaces the sites of a graph by nodes of the op, in a way that can be undone.

What a site computes must not change: the op's result has the dtype, shape and strides of what it
replaces (:class:`DifferentResult` otherwise), values that leave the site stay available, and an
error leaves the graph as it was.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from gatefuse.inductor.fx_utils import known, roundings, same_shape
from gatefuse.inductor.match_gate import Site, logit_shape_op, site_dtype
from gatefuse.inductor.node_order import put_back, sort
from gatefuse.settings import Options

__all__ = ["META_KEY", "DifferentResult", "Rewriter", "check_same", "erase_unused", "insert_call"]

aten = torch.ops.aten
prims = torch.ops.prims

META_KEY = "gatefuse"
"""Key of ``node.meta`` under which an op node carries a dict for the lowering."""


class Rewriter:
    """Replaces sites by op nodes. Erases nothing before :meth:`finish`, so that all of it can be
    undone."""

    def __init__(self, graph: Graph, opts: Options) -> None:
        self.graph = graph
        self.options = opts
        self.sites: list[Site] = []
        self.new: list[Node] = []
        self.replaced: dict[Node, Node] = {}
        self.users: list[tuple[Node, Any, Any]] = []
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
            "batch_invariant": self.options.batch_invariant,
            "roundings": _roundings(site),
        }
        if logit is not None:
            self.replaced[site.logit] = logit
        self.replaced[site.anchor] = result
        self.sites.append(site)
        return op

    def finish(self) -> None:
        """Let users use the new nodes, bring the graph in order and erase what nobody uses."""
        if not self.sites:
            return
        # Each user once: an output of the graph may use them all.
        for user in dict.fromkeys(user for old in self.replaced for user in old.users):
            self.users.append((user, user.args, user.kwargs))
            user.args = torch.fx.map_arg(user.args, self._now)
            user.kwargs = torch.fx.map_arg(user.kwargs, self._now)
        if any(site.keeps_logit for site in self.sites):
            self.order = list(self.graph.nodes)
            sort(self.graph)
        self.graph.lint()
        # The rest of a site goes with what it leads to, or stays because something else uses it.
        erase_unused(self.graph, [n for site in self.sites for n in (site.logit, site.anchor)])

    def undo(self) -> None:
        """Put the graph back, after an error before anything was erased."""
        for user, args, kwargs in self.users:
            user.args, user.kwargs = args, kwargs
        put_back(self.order)
        self._erase_new(0)

    def _erase_new(self, start: int) -> None:
        for node in reversed(self.new[start:]):
            self.graph.erase_node(node)
        del self.new[start:]

    def _now(self, node: Node) -> Node:
        """The node that stands for ``node`` after the rewrites so far."""
        while node in self.replaced:
            node = self.replaced[node]
        return node

    def _call(self, site: Site, target: Any, *args: Any, **kwargs: Any) -> Node:
        node = insert_call(self.graph, site.anchor, target, *args, **kwargs)
        self.new.append(node)
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
            value = call(view.target, value, *view.args[1:])

        operands = [input, weight, value, bias, addend]
        while operands[-1] is None:
            operands.pop()
        logit: Node | None = None
        if site.keeps_logit:
            with_logit = torch.ops.gatefuse.linear_sigmoid_mul_logit.default
            op = call(with_logit, *operands, logit_dtype=site.logit.meta["val"].dtype)
            result = call(operator.getitem, op, 0)
            logit = call(operator.getitem, op, 1)
            shape_op = logit_shape_op(site.logit, site.input)
            assert shape_op is not None
            if shape_op[0] is not aten.alias.default:
                logit = call(shape_op[0], logit, *shape_op[1])
            check_same(logit.meta["val"], site.logit.meta["val"])
        else:
            result = op = call(torch.ops.gatefuse.linear_sigmoid_mul.default, *operands)
        if given != wanted:
            result = call(prims.convert_element_type.default, result, wanted)
        check_same(result.meta["val"], site.anchor.meta["val"])
        return op, result, logit


def insert_call(graph: Graph, like: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
    """A new node with shape metadata at the graph's insertion point, attributed to the source line
    of ``like``."""
    node = graph.call_function(target, args, kwargs)
    for name in ("stack_trace", "nn_module_stack", "source_fn_stack"):
        if name in like.meta:
            node.meta[name] = like.meta[name]
    if isinstance(target, torch._ops.OpOverload):
        node.meta["original_aten"] = target  # Inductor names its kernels by it
    mode = getattr(like.meta["val"], "fake_mode", None)
    shape_env = getattr(mode, "shape_env", None)
    try:
        with contextlib.ExitStack() as stack:
            if mode is not None:
                stack.enter_context(mode)
            if shape_env is not None:
                stack.enter_context(shape_env.suppress_guards())
            values = torch.fx.map_arg((args, kwargs), lambda n: n.meta["val"])
            node.meta["val"] = target(*values[0], **values[1])
    except Exception:
        graph.erase_node(node)
        raise
    return node


def erase_unused(graph: Graph, stack: list[Node]) -> None:
    """Erase nodes that nobody uses, and what only they needed: views, conversions and the like, no
    inputs of the graph."""
    erased = set[Node]()
    while stack:
        node = stack.pop()
        if node.users or node in erased or node.is_impure():
            continue
        erased.add(node)
        sources = node.all_input_nodes
        graph.erase_node(node)
        stack.extend(sources)


def _roundings(site: Site) -> dict[str, tuple[torch.dtype, ...]]:
    """What the unfused graph rounds the values of a site to: each product and the sum of the
    linear, the logit, the gate, the gated value."""
    sigmoid = site.chain.index(site.sigmoid)
    return {
        "product": site.product_roundings,
        "sum": site.sum_roundings,
        "logit": roundings(site.chain[:sigmoid]),
        "gate": roundings(site.chain[sigmoid:]),
        "gated": () if site.mul is site.anchor else roundings([site.mul]),
    }


class DifferentResult(Exception):
    """The op's result cannot be shown to look like what it would replace."""


def check_same(new: torch.Tensor, old: torch.Tensor) -> None:
    """Raise :class:`DifferentResult` unless dtype, shape and (where a size is not 1) strides of the
    two are equal."""
    if new.dtype != old.dtype:
        raise DifferentResult(f"the op would return {new.dtype}, not {old.dtype}")
    if not same_shape(new.shape, old.shape):
        raise DifferentResult(
            f"shape {tuple(new.shape)} of the op's result cannot be shown to be {tuple(old.shape)}"
        )
    for size, a, b in zip(new.shape, new.stride(), old.stride()):
        if not known(size == 1) and not known(a == b):
            raise DifferentResult(
                f"strides {new.stride()} of the op's result cannot be shown to be {old.stride()}"
            )
