"""Finds the gate in a functional ATen graph; changes nothing.

Each ``sigmoid`` of the graph is a candidate and ends as a :class:`Site` or as a
:class:`Rejection` with a reason. From the sigmoid the matcher walks up to the linear that makes the
logit and down to the multiply, through any operators that neither reorder rows nor compute.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from gatefuse.inductor.fx_utils import (
    FLOAT_DTYPES,
    NoMatch,
    is_neutral,
    known,
    same_shape,
    source_of,
    tensor_of,
    val_of,
)
from gatefuse.inductor.match_linear import Linear, match_logit
from gatefuse.inductor.node_order import Order, upstream
from gatefuse.ops import result_dtype

__all__ = ["Rejection", "Site", "find_sites", "logit_shape_op", "site_dtype"]

aten = torch.ops.aten

_DEVICES = ("cpu", "cuda", "xpu", "meta")


@dataclass(frozen=True)
class Site:
    """One gate, ready to be rewritten.

    logit: the node of the full linear, bias included. chain: the nodes from there to the gate,
    logit and sigmoid among them. input has rows of width H in its last dimension; weight and bias
    may have any shape with H and 1 elements. product_roundings, sum_roundings: the linear's, see
    :class:`gatefuse.inductor.match_linear.Linear`. anchor: the node that the op replaces, ``mul``
    or the add after it. value_views: shape operators between mul and add, which move to the value.
    """

    sigmoid: Node
    logit: Node
    chain: tuple[Node, ...]
    input: Node
    weight: Node
    bias: Node | None
    product_roundings: tuple[torch.dtype, ...]
    sum_roundings: tuple[torch.dtype, ...]
    mul: Node
    value: Node
    addend: Node | None
    anchor: Node
    value_views: tuple[Node, ...]
    keeps_logit: bool


@dataclass(frozen=True)
class Rejection:
    """A sigmoid that stays as it is, and why."""

    node: Node
    reason: str


def _match_muls(sigmoid: Node) -> tuple[list[tuple[tuple[Node, ...], Node, Node]], str]:
    """All multiplies with one gate per row, each with the nodes between sigmoid and multiply and
    the other factor; and, if there are none, why."""
    found = []
    reason = "the gate is not multiplied with anything"
    queue: list[tuple[Node, tuple[Node, ...]]] = [(sigmoid, ())]
    for node, path in queue:
        gate = tensor_of(node, "the gate")
        for user in node.users:
            if is_neutral(user) or _broadcasts_last(user):
                queue.append((user, (*path, user)))
            elif user.op == "call_function" and user.target is aten.mul.Tensor:
                a, b = user.args
                other = b if a is node else a
                if not isinstance(other, Node) or other is node or val_of(other) is None:
                    reason = "the gate is multiplied by a constant or by itself"
                    continue
                problem = _broadcast_problem(
                    gate.shape,
                    tensor_of(other, "the value").shape,
                    tensor_of(user, "product").shape,
                )
                if problem is None:
                    found.append((path, user, other))
                else:
                    reason = problem
    return found, reason


def _broadcasts_last(node: Node) -> bool:
    """An expand of ``[..., 1]`` to ``[..., D]``."""
    if node.op != "call_function" or node.target is not aten.expand.default:
        return False
    source, result = val_of(node.args[0]), val_of(node)
    return (
        source is not None
        and result is not None
        and source.dim() == result.dim() >= 1
        and known(source.shape[-1] == 1)
        and same_shape(source.shape[:-1], result.shape[:-1])
    )


def _broadcast_problem(gate: Any, value: Any, out: Any) -> str | None:
    """Why ``gate * value`` is not one gate per row of value, or None if it is."""
    if not same_shape(value, out):
        return "the product is wider than the value (the gate broadcasts it)"
    if len(out) < 1 or len(gate) != len(out):
        return "the gate has fewer dimensions than the value"
    if not same_shape(gate[:-1], out[:-1]):
        return "one gate serves several rows of the value"
    if known(out[-1] == 1):
        return "the value is one element wide: nothing to broadcast"
    if not (known(gate[-1] == 1) or known(gate[-1] == out[-1])):
        return "the gate is elementwise"
    return None


def _match_addend(mul: Node) -> tuple[Node, Node, tuple[Node, ...]] | None:
    """``add(addend, mul)``, perhaps through a reshape: (add, addend, reshapes), or None."""
    node, views = mul, list[Node]()
    width = tensor_of(mul, "the product").shape[-1]
    while len(node.users) == 1:
        user = next(iter(node.users))
        if user.op != "call_function":
            return None
        out = val_of(user)
        if out is None or out.dtype != tensor_of(mul, "the product").dtype:
            return None
        if user.target is aten.add.Tensor:
            if user.kwargs.get("alpha", 1) != 1 or len(user.args) != 2:
                return None
            a, b = user.args
            addend = b if a is node else a
            if not isinstance(addend, Node) or addend is node:
                return None
            av = val_of(addend)
            if (
                av is None
                or av.dtype != out.dtype
                or av.device != out.device
                or not same_shape(av.shape, out.shape)
                or not same_shape(out.shape, tensor_of(node, "the product").shape)
            ):
                return None
            return user, addend, tuple(views)
        if (
            user.target not in (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
            or out.dim() < 1
            or not known(out.shape[-1] == width)
        ):
            return None
        views.append(user)
        node = user
    return None


def _check_dtypes(nodes: dict[str, Node | None]) -> None:
    devices = set()
    for name, node in nodes.items():
        if node is None:
            continue
        val = tensor_of(node, f"the {name}")
        if val.dtype not in FLOAT_DTYPES:
            raise NoMatch(f"the {name} is {str(val.dtype).removeprefix('torch.')}")
        if val.layout is not torch.strided:
            raise NoMatch(f"the {name} is not a strided tensor")
        devices.add(val.device)
        if val.device.type not in _DEVICES:
            raise NoMatch(f"not tried on device {val.device.type}")
    if len(devices) > 1:
        raise NoMatch(f"operands are on several devices: {', '.join(sorted(map(str, devices)))}")


def _match_site(sigmoid: Node, order: Order, taken: set[Node], sites: list[Site]) -> Site:
    logit, upper, linear = match_logit(sigmoid)
    products, reason = _match_muls(sigmoid)
    for lower, mul, value in products:
        try:
            chain = (*upper, *lower)
            return _site(sigmoid, logit, chain, linear, mul, value, order, taken, sites)
        except NoMatch as e:
            reason = str(e)
    raise NoMatch(reason)


def _site(
    sigmoid: Node,
    logit: Node,
    chain: tuple[Node, ...],
    linear: Linear,
    mul: Node,
    value: Node,
    order: Order,
    taken: set[Node],
    sites: list[Site],
) -> Site:
    _check_dtypes(
        {
            "logit": logit,
            "input": linear.input,
            "weight": linear.weight,
            "bias": linear.bias,
            "gate": chain[-1],
            "value": value,
            "product": mul,
        }
    )
    rows = tensor_of(linear.input, "the input").shape[:-1]
    if not known(math.prod(rows) == math.prod(tensor_of(value, "the value").shape[:-1])):
        raise NoMatch("input and value differ in their number of rows")
    if order.writes_between(_first_reader(logit, linear, order), mul):
        raise NoMatch("memory is written between the linear and the multiply")
    inside = set(chain)
    if any(_adds_lerp(user, mul, inside) for user in mul.users):
        raise NoMatch("a lerp between two values is no site yet")
    views: tuple[Node, ...]
    anchor, addend, views = _match_addend(mul) or (mul, None, ())
    if anchor in taken or order.writes_between(mul, anchor):
        anchor, addend, views = mul, None, ()

    keeps_logit = any(user not in inside and user is not mul for n in chain for user in n.users)
    if keeps_logit:
        # The op takes the place of the logit for its other users too, so none of its operands may
        # depend on it.
        lowest, further = _rewritten_inputs(logit, sites, order)

        def depends(nodes: list[Node]) -> bool:
            return not inside.isdisjoint(upstream(nodes, lowest, order, further))

        operands = [n for n in (linear.input, linear.weight, linear.bias, value) if n]
        if depends(operands):
            raise NoMatch("the value depends on the logit")
        if addend is not None and depends([addend]):
            anchor, addend, views = mul, None, ()
        if order.draws_between(logit, anchor) > 1:  # what reads the logit moves behind the op
            raise NoMatch("random numbers are drawn between the linear and the multiply")
        if logit_shape_op(logit, linear.input) is None:
            raise NoMatch("the logit is used elsewhere, in a shape that is not one per row")
    return Site(
        sigmoid=sigmoid,
        logit=logit,
        chain=chain,
        input=linear.input,
        weight=linear.weight,
        bias=linear.bias,
        product_roundings=linear.product_roundings,
        sum_roundings=linear.sum_roundings,
        mul=mul,
        value=value,
        addend=addend,
        anchor=anchor,
        value_views=views,
        keeps_logit=keeps_logit,
    )


def _rewritten_inputs(
    logit: Node, sites: list[Site], order: Order
) -> tuple[int, dict[Node, list[Node]]]:
    """What the logits of ``sites`` depend on once they are results of the op, for those sites that
    matter to dependencies on ``logit``; and the position above which all of these nodes are."""
    lowest, further = order[logit], dict[Node, list[Node]]()
    kept = [site for site in sites if site.keeps_logit]
    for site in sorted(kept, key=lambda site: order[site.anchor], reverse=True):
        if order[site.anchor] < lowest:
            break
        operands = (site.input, site.weight, site.bias, site.value, site.addend)
        further[site.logit] = [n for n in operands if n is not None]
        lowest = min(lowest, order[site.logit])
    return lowest, further


def _adds_lerp(add: Node, mul: Node, gate: set[Node]) -> bool:
    """Whether ``add`` is ``mul + (1 - gate) * other``."""
    if add.op != "call_function" or add.target is not aten.add.Tensor:
        return False
    others = [n for n in add.all_input_nodes if n is not mul and n.target is aten.mul.Tensor]
    complements = [n for other in others for n in other.all_input_nodes]
    while any(is_neutral(n) for n in complements):
        complements = [source_of(n) if is_neutral(n) else n for n in complements]
    return any(
        n.target in (aten.sub.Tensor, aten.rsub.Scalar)
        and any(g in gate for g in n.all_input_nodes)
        for n in complements
    )


def _first_reader(logit: Node, linear: Linear, order: Order) -> Node:
    """The first of the nodes from the linear's operands to the logit: where they are first read."""
    operands = (linear.input, linear.weight, linear.bias)
    first, stack = logit, [logit]
    while stack:
        node = stack.pop()
        if order[node] < order[first]:
            first = node
        stack.extend(n for n in node.all_input_nodes if n not in operands)
    return first


def logit_shape_op(logit: Node, input: Node) -> tuple[Callable[..., Any], tuple[Any, ...]] | None:
    """How the logits ``[..., 1]`` of an input ``[..., H]`` become the shape of ``logit``: an
    operator and its further arguments (``aten.alias`` where they have it), or None."""
    shape = tensor_of(logit, "the logit").shape
    lead = tensor_of(input, "the input").shape[:-1]
    if same_shape(shape, [*lead, 1]):
        return aten.alias.default, ()
    if same_shape(shape, lead):
        return aten.squeeze.dim, (-1,)
    free = [i for i, s in enumerate(shape) if not isinstance(s, int)]
    if len(free) <= 1:
        return aten.reshape.default, ([-1 if i in free else s for i, s in enumerate(shape)],)
    return None


def site_dtype(site: Site) -> torch.dtype:
    """The dtype in which the op would return the site's result."""
    operands = (site.input, site.weight, site.bias, site.value, site.addend)
    return result_dtype(*(tensor_of(n, "an operand").dtype for n in operands if n is not None))


def find_sites(graph: Graph) -> tuple[list[Site], list[Rejection]]:
    """The gates of a functional ATen graph whose nodes carry ``meta["val"]``, in graph order.

    Changes nothing; every ``aten.sigmoid`` ends in one of the two lists. Linear in the size of the
    graph.
    """
    sites: list[Site] = []
    rejections: list[Rejection] = []
    order = Order(graph)
    taken: set[Node] = set()
    for sigmoid in graph.find_nodes(op="call_function", target=aten.sigmoid.default):
        try:
            site = _match_site(sigmoid, order, taken, sites)
            if site.mul in taken or any(n in taken for n in site.chain):
                raise NoMatch("the product is part of another site")
        except NoMatch as e:
            rejections.append(Rejection(sigmoid, str(e)))
            continue
        taken.update(site.chain, (site.mul, site.anchor))
        sites.append(site)
    return sites, rejections
