"""Finds the gate in a functional ATen graph; changes nothing.

Each ``sigmoid`` of the graph is a candidate and ends as a :class:`Site` or as a
:class:`Rejection` with a reason. From the sigmoid the matcher walks up to the linear that makes the
logit and down to the multiply, through any operators that neither reorder rows nor compute.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from gatefuse.inductor.fx_utils import (
    FLOAT_DTYPES,
    NoMatch,
    arguments,
    batch_fusion_note,
    described,
    is_neutral,
    known,
    same_shape,
    source_of,
    tensor_of,
    val_of,
)
from gatefuse.inductor.match_linear import Linear, match_logit
from gatefuse.inductor.match_sigmoid import Sigmoid, find_sigmoids
from gatefuse.inductor.near_misses import near_misses, scales_rows_in_part
from gatefuse.inductor.node_order import KeptLogits, Order
from gatefuse.operands import result_dtype
from gatefuse.records import Kind

__all__ = ["Rejection", "Site", "find_sites", "logit_shape_op", "site_dtype"]

log = logging.getLogger("gatefuse")
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
    """A sigmoid that stays as it is, why, and how near to a gate it is."""

    node: Node
    reason: str
    kind: Kind = "gate"


class _Product(NamedTuple):
    """A multiply of one gate per row with a value.

    path: the nodes from the sigmoid to the multiply. addend: that of an addcmul, or None.
    """

    path: tuple[Node, ...]
    mul: Node
    value: Node
    addend: Node | None


def _match_products(sigmoid: Node) -> tuple[list[_Product], str]:
    """All products of the gate with a value; and, if there are none, why."""
    found = []
    problem, ends = "", list[Node]()
    queue: list[tuple[Node, tuple[Node, ...]]] = [(sigmoid, ())]
    for node, path in queue:
        for user in node.users:
            if is_neutral(user) or _broadcasts_last(user):
                queue.append((user, (*path, user)))
                continue
            if user.target is aten.mul.Tensor:
                factors, addend = list(arguments(user)), None
            elif user.target is aten.addcmul.default and node in arguments(user)[1:3]:
                addend, *factors, scale = arguments(user)
                if scale != 1:
                    problem = "addcmul scales the product"
                    continue
                if (misfit := _addend_problem(user, addend)) is not None:
                    problem = misfit
                    continue
            else:
                ends.append(user)
                continue
            other = factors[1] if factors[0] is node else factors[0]
            if other is node or val_of(other) is None:
                problem = "the gate is multiplied by a constant or by itself"
                continue
            shapes = (tensor_of(n, "a factor").shape for n in (node, other, user))
            mismatch = _broadcast_problem(*shapes)
            if mismatch is None:
                found.append(_Product(path, user, other, addend))
            else:
                problem = mismatch
    return found, problem or _not_multiplied(ends)


def _not_multiplied(ends: list[Node]) -> str:
    """The reason for a gate of which nothing is a product, by where it goes instead."""
    problem = "the gate is not multiplied with anything"
    goes_on = [node for node in ends if node.op != "output"]
    if goes_on:
        return f"{problem}: it goes into {described(goes_on[0])}{batch_fusion_note()}"
    split = torch.distributed.is_available() and torch.distributed.is_initialized()
    advice = (
        "; DistributedDataParallel's optimizer splits graphs between its buckets, see "
        "torch._dynamo.config.optimize_ddp"
    )
    return f"{problem} in this graph, which returns it{advice if split else ''}"


def _addend_problem(addcmul: Node, addend: Any) -> str | None:
    """Why the sum in an addcmul is not one of the value's shape and dtype, or None."""
    out, av = tensor_of(addcmul, "the sum"), val_of(addend)
    if av is None or av.dtype != out.dtype or not same_shape(av.shape, out.shape):
        return "the addend of addcmul is broadcast or of another dtype"
    return None


def _broadcasts_last(node: Node) -> bool:
    """``[..., 1]`` to ``[..., D]``, by an expand or a repeat."""
    if node.target not in (aten.expand.default, aten.repeat.default):
        return False
    source, result = val_of(arguments(node)[0]), val_of(node)
    return (
        source is not None
        and result is not None
        and source.dim() >= 1
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
    return None


def _match_addend(mul: Node) -> tuple[Node, Node, tuple[Node, ...]] | None:
    """``add(addend, mul)``, perhaps through a reshape: (add, addend, reshapes), or None."""
    node, views = mul, list[Node]()
    width = tensor_of(mul, "the product").shape[-1]
    while len(node.users) == 1:
        user = next(iter(node.users))
        out = val_of(user)
        if out is None or out.dtype != tensor_of(mul, "the product").dtype:
            return None
        if user.target is aten.add.Tensor:
            a, b, alpha = arguments(user)
            if alpha != 1:
                return None
            addend = b if a is node else a
            if addend is node:
                return None
            av = val_of(addend)
            if (
                av is None
                or av.dtype != out.dtype
                or not same_shape(av.shape, out.shape)
                or not same_shape(out.shape, tensor_of(node, "the product").shape)
            ):
                return None
            return user, addend, tuple(views)
        if user.target not in (
            aten.view.default,
            aten.reshape.default,
            aten._unsafe_view.default,
        ) or not known(out.shape[-1] == width):
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


def _match_site(sigmoid: Sigmoid, order: Order, taken: set[Node], kept: KeptLogits) -> Site:
    logit, upper, linear = match_logit(sigmoid)
    products, reason = _match_products(sigmoid.gate)
    for product in products:
        try:
            return _site(sigmoid.gate, logit, upper, linear, product, order, taken, kept)
        except NoMatch as e:
            reason = str(e)
    raise NoMatch(reason)


def _site(
    sigmoid: Node,
    logit: Node,
    upper: list[Node],
    linear: Linear,
    product: _Product,
    order: Order,
    taken: set[Node],
    kept: KeptLogits,
) -> Site:
    mul, value = product.mul, product.value
    chain = (*upper, *product.path)
    nodes = {"logit": logit, "input": linear.input, "weight": linear.weight, "bias": linear.bias}
    _check_dtypes({**nodes, "gate": chain[-1], "value": value, "product": mul})
    rows = tensor_of(linear.input, "the input").shape[:-1]
    if not known(math.prod(rows) == math.prod(tensor_of(value, "the value").shape[:-1])):
        raise NoMatch("input and value differ in their number of rows")
    if order.draws() > 1:
        # Inductor's scheduler orders kernels by what they need, draws of ATen's included: other
        # kernels, and the random numbers are drawn in another order.
        raise NoMatch(
            "random numbers are drawn more than once in this graph, in an order that counts"
        )
    if order.writes_between(_first_reader(logit, linear, order), mul):
        raise NoMatch("memory is written between the linear and the multiply")
    inside = set(chain)
    if any(_adds_lerp(user, mul, inside) for user in mul.users):
        raise NoMatch("a lerp between two values is no site yet")
    anchor, addend, views = mul, product.addend, tuple[Node, ...]()
    found = None if addend is not None else _match_addend(mul)
    if found and found[0] not in taken and not order.writes_between(mul, found[0]):
        anchor, addend, views = found

    keeps_logit = any(user not in inside and user is not mul for n in chain for user in n.users)
    if keeps_logit:
        # The op takes the place of the logit for its other users too, so none of its operands may
        # depend on it.
        operands = [n for n in (linear.input, linear.weight, linear.bias, value) if n]
        if kept.depends(operands, logit, inside):
            raise NoMatch("the value depends on the logit")
        if addend is not None and kept.depends([addend], logit, inside):
            if product.addend is not None:
                raise NoMatch("the addend depends on the logit")
            anchor, addend, views = mul, None, ()
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


def _adds_lerp(add: Node, mul: Node, gate: set[Node]) -> bool:
    """Whether ``add`` is ``mul + (1 - gate) * other``."""
    if add.target is not aten.add.Tensor:
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


def _kind(sigmoid: Sigmoid) -> Kind:
    """How near to a gate a rejected sigmoid is: what it has of linear and product."""
    linear = product = False
    with contextlib.suppress(Exception):
        linear = match_logit(sigmoid) is not None
    with contextlib.suppress(Exception):
        wide = math.prod(tensor_of(sigmoid.gate, "the gate").shape)
        products = [tensor_of(p.mul, "the product") for p in _match_products(sigmoid.gate)[0]]
        product = any(not known(math.prod(p.shape) == wide) for p in products)
        product = product or scales_rows_in_part(sigmoid.gate)
    return "gate" if linear and product else "near miss" if linear or product else "other"


def find_sites(graph: Graph) -> tuple[list[Site], list[Rejection]]:
    """The gates of a functional ATen graph whose nodes carry ``meta["val"]``, in graph order.

    Changes nothing; every ``aten.sigmoid`` ends in one of the two lists. Linear in the size of the
    graph.
    """
    sites: list[Site] = []
    rejections: list[Rejection] = []
    order = Order(graph)
    taken: set[Node] = set()
    kept = KeptLogits(order)
    for sigmoid in find_sigmoids(graph):
        try:
            site = _match_site(sigmoid, order, taken, kept)
            if site.mul in taken or any(n in taken for n in site.chain):
                raise NoMatch("the product is part of another site")
        except NoMatch as e:
            rejections.append(Rejection(sigmoid.gate, str(e), _kind(sigmoid)))
            continue
        except Exception as e:  # a node nobody foresaw leaves the other gates alone
            log.warning("gatefuse: %s cannot be read", sigmoid.gate, exc_info=True)
            rejections.append(Rejection(sigmoid.gate, f"cannot be read: {type(e).__name__}: {e}"))
            continue
        taken.update(site.chain, (site.mul, site.anchor))
        sites.append(site)
        if site.keeps_logit:
            operands = (site.input, site.weight, site.bias, site.value, site.addend)
            kept.add(site.logit, site.anchor, [n for n in operands if n is not None])
    rejections += [Rejection(n, reason, "near miss") for n, reason in near_misses(graph, taken)]
    return sites, rejections
