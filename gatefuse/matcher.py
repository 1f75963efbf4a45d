"""Finds the gate in a functional ATen graph; changes nothing.

Each ``sigmoid`` of the graph is a candidate and ends as a :class:`Site` or as a
:class:`Rejection` with a reason. From the sigmoid the matcher walks up to the linear that makes the
logit and down to the multiply, through any operators that neither reorder rows nor compute.
"""

from __future__ import annotations

import bisect
import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from gatefuse.ops import result_dtype

__all__ = ["Rejection", "Site", "find_sites", "logit_shape_op", "site_dtype"]

aten = torch.ops.aten
prims = torch.ops.prims

_CONVERSIONS = {prims.convert_element_type.default, aten._to_copy.default}
_SHAPE_OPS = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.alias.default,
    aten.detach.default,
    aten.clone.default,
}
_TRANSPOSES = {aten.permute.default, aten.transpose.int, aten.t.default}
_PACKED_LINEARS = ("mkldnn::_linear_pointwise", "mkl::_mkl_linear", "onednn::")
_DEVICES = ("cpu", "cuda", "xpu", "meta")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_PRECISION = {torch.float16: 0, torch.bfloat16: 0, torch.float32: 1}


@dataclass(frozen=True)
class Site:
    """One gate, ready to be rewritten.

    logit: the node of the full linear, bias included. chain: the nodes from there to the gate,
    logit and sigmoid among them. input has rows of width H in its last dimension; weight and bias
    may have any shape with H and 1 elements. anchor: the node that the op replaces, ``mul`` or the
    add behind it. value_views: shape operators between mul and add, which move to the value.
    """

    sigmoid: Node
    logit: Node
    chain: tuple[Node, ...]
    input: Node
    weight: Node
    bias: Node | None
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


class _Reject(Exception):
    pass


def _val(node: Any) -> torch.Tensor | None:
    val = node.meta.get("val") if isinstance(node, Node) else None
    return val if isinstance(val, torch.Tensor) else None


def _tensor(node: Any, what: str) -> torch.Tensor:
    val = _val(node)
    if val is None:
        raise _Reject(f"{what} has no tensor metadata")
    return val


def _known(condition: Any) -> bool:
    """Whether a condition on sizes holds for every size; installs no guard."""
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def _same_shape(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(_known(x == y) for x, y in zip(a, b))


def _numel_is_one(shape: Any) -> bool:
    return all(_known(s == 1) for s in shape)


def _moves_only_ones(node: Node) -> bool:
    """Whether a transpose leaves the row-major order of elements alone."""
    source = _val(node.args[0])
    if source is None:
        return False
    dims: Any = node.args[1:]
    order = list(range(source.dim()))
    if node.target is aten.permute.default:
        order = [d % source.dim() for d in dims[0]]
    elif source.dim() >= 2:
        a, b = dims if node.target is aten.transpose.int else (0, 1)
        order[a], order[b] = order[b], order[a]
    kept = [d for d in order if not _known(source.shape[d] == 1)]
    return kept == sorted(kept)


def _is_shape_op(node: Node) -> bool:
    """An operator that keeps elements, their number and their row-major order."""
    if node.op != "call_function":
        return False
    if node.target in _SHAPE_OPS:
        return True
    if node.target in _TRANSPOSES:
        return _moves_only_ones(node)
    if node.target is aten.expand.default:
        source, result = _val(node.args[0]), _val(node)
        return (
            source is not None and result is not None and _known(source.numel() == result.numel())
        )
    return False


def _is_float_conversion(node: Node) -> bool:
    if node.op != "call_function" or node.target not in _CONVERSIONS:
        return False
    source, result = _val(node.args[0]), _val(node)
    return (
        source is not None
        and result is not None
        and source.dtype in _DTYPES
        and result.dtype in _DTYPES
        and source.device == result.device
    )


def _is_neutral(node: Node) -> bool:
    """Neither computes nor reorders: shape operators, float conversions, multiplication by 1."""
    if _is_shape_op(node) or _is_float_conversion(node):
        return True
    return (
        node.op == "call_function"
        and node.target is aten.mul.Tensor
        and isinstance(node.args[1], (int, float))
        and node.args[1] == 1
    )


def _source(node: Node) -> Node:
    source = node.args[0]
    assert isinstance(source, Node)
    return source


def _widens(node: Node) -> bool:
    source, result = _val(node.args[0]), _val(node)
    assert source is not None and result is not None
    return source.dtype == result.dtype or _PRECISION[source.dtype] < _PRECISION[result.dtype]


def _wide_source(node: Node) -> Node:
    """Walks up through conversions that lose nothing (the op computes in float32 anyway)."""
    while _is_float_conversion(node) and _widens(node):
        node = _source(node)
    return node


def _row_source(node: Node, width: Any) -> Node | None:
    """The nearest node above, or ``node``, that holds the same elements in rows of ``width``."""
    current: Node | None = node
    found: Node | None = None
    while current is not None:
        val = _val(current)
        if val is not None and val.dim() >= 1 and _known(val.shape[-1] == width):
            found = current
            if not (_is_float_conversion(current) and _widens(current)):
                return found
        if _is_shape_op(current) or (_is_float_conversion(current) and _widens(current)):
            current = _source(current)
        else:
            return found
    return found


def _weight_source(node: Node, width: Any) -> Node:
    """The parameter behind a weight operand: as far up as it is ``[1, width]`` or ``[width]``.

    All dimensions but one have size 1, so no transpose on the way can reorder the elements.
    """
    best = current = node
    while (
        current.op == "call_function" and (current.target in _TRANSPOSES or _is_shape_op(current))
    ) or (_is_float_conversion(current) and _widens(current)):
        current = _source(current)
        val = _val(current)
        if val is not None and val.dim() in (1, 2) and _known(val.shape[-1] == width):
            best = current
    return best


@dataclass(frozen=True)
class _Linear:
    input: Node
    weight: Node
    bias: Node | None


def _unpadded(node: Node) -> Node:
    """What is padded with zeros at the ends of its dimensions, or ``node``."""
    if node.op == "call_function" and node.target is aten.constant_pad_nd.default:
        pads: Any = node.args[1]
        fill = node.args[2] if len(node.args) > 2 else 0
        if fill == 0 and all(p == 0 for p in pads[::2]) and all(p >= 0 for p in pads[1::2]):
            return _source(node)
    return node


def _product_of_slice(node: Node) -> Node:
    """The padded matrix product that ``node`` is the first rows and columns of.

    Inductor pads products to multiples of 8 where it finds that faster (``shape_padding``).
    """
    rows = _tensor(node, "the logit").shape
    while node.op == "call_function" and node.target is aten.slice.Tensor:
        start = node.args[2] if len(node.args) > 2 else None
        step = node.args[4] if len(node.args) > 4 else 1
        if start not in (0, None) or step != 1:
            raise _Reject("the logit is a slice")
        node = _source(node)
    operands: Any = {aten.mm.default: (0, 1), aten.addmm.default: (1, 2), aten.bmm.default: (0, 1)}
    if node.op != "call_function" or node.target not in operands:
        raise _Reject("the logit is a slice")
    x, w = (_unpadded(node.args[i]) for i in operands[node.target])
    xv, wv = _tensor(x, "the input of the linear"), _tensor(w, "the weight")
    if not (
        _same_shape(rows, [*xv.shape[:-1], wv.shape[-1]]) and _known(xv.shape[-1] == wv.shape[-2])
    ):
        raise _Reject("the logit is a slice")
    return node


def _linear_of_mm(x: Node, w: Node, bias: Node | None, sliced: bool) -> _Linear:
    if sliced:
        x, w = _unpadded(x), _unpadded(w)
    xv, wv = _tensor(x, "the input of the linear"), _tensor(w, "the weight")
    if not _known(wv.shape[-1] == 1):
        raise _Reject(f"the linear has {wv.shape[-1]} outputs, not 1")
    width = xv.shape[-1]
    return _Linear(_wide_source(x), _weight_source(w, width), bias)


def _match_sum(node: Node) -> _Linear:
    """``sum(input * weight)`` over the width: coordinate descent and handwritten code."""
    product: Any = node.args[0]
    dims: Any = node.args[1] if len(node.args) > 1 else None
    while _is_float_conversion(product) and _widens(product):
        product = _source(product)
    if product.op != "call_function" or product.target is not aten.mul.Tensor:
        raise _Reject("the logit is not linear(H -> 1)")
    pv = _tensor(product, "the product")
    if not isinstance(dims, (list, tuple)) or len(dims) != 1:
        raise _Reject("the logit is a sum over more than one dimension")
    dim: int = dims[0] % pv.dim()
    if not all(_known(s == 1) for s in pv.shape[dim + 1 :]):
        raise _Reject("the logit is a sum over a dimension that is not the last")
    width = pv.shape[dim]
    for x, w in (product.args, product.args[::-1]):
        if not isinstance(x, Node) or not isinstance(w, Node):
            raise _Reject("the logit is not linear(H -> 1)")
        xv, wv = _tensor(x, "the input of the linear"), _tensor(w, "the weight")
        if not _same_shape(xv.shape, pv.shape):
            continue
        w_dims = [1] * (pv.dim() - wv.dim()) + list(wv.shape)
        if not _known(w_dims[dim] == width):
            continue
        if not all(_known(s == 1) for d, s in enumerate(w_dims) if d != dim):
            continue
        input = _row_source(x, width)
        if input is None:
            raise _Reject("the input's rows are not in its last dimension")
        return _Linear(input, _weight_source(w, width), None)
    raise _Reject("the logit is a sum of products, but neither factor is one row of weights")


def _match_linear(node: Node) -> _Linear:
    """The linear that ``node`` is, without a bias added afterwards, or _Reject."""
    if node.op != "call_function":
        raise _Reject("the logit is an input of the graph")
    sliced = node.target is aten.slice.Tensor
    if sliced:
        node = _product_of_slice(node)
    target, args = node.target, node.args
    if target is aten.mm.default:
        return _linear_of_mm(args[0], args[1], None, sliced)  # type: ignore[arg-type]
    if target is aten.addmm.default:
        if node.kwargs.get("beta", 1) != 1 or node.kwargs.get("alpha", 1) != 1:
            raise _Reject("the linear is scaled (addmm with alpha or beta)")
        bias = args[0]
        assert isinstance(bias, Node)
        linear = _linear_of_mm(args[1], args[2], bias, sliced)  # type: ignore[arg-type]
        if not _numel_is_one(_tensor(bias, "the bias").shape):
            raise _Reject("the bias differs from row to row")
        return linear
    if target is aten.mv.default:
        x, w = args
        assert isinstance(x, Node) and isinstance(w, Node)
        return _Linear(_wide_source(x), _weight_source(w, _tensor(x, "the input").shape[-1]), None)
    if target is aten.bmm.default:
        x, w = args
        assert isinstance(x, Node) and isinstance(w, Node)
        if not _known(_tensor(w, "the weight").shape[0] == 1):
            raise _Reject("the logit is a batched product with one weight per batch")
        return _linear_of_mm(x, w, None, sliced)
    if target is aten.sum.dim_IntList:
        return _match_sum(node)
    if any(str(target).startswith(p.replace("::", ".")) for p in _PACKED_LINEARS):
        raise _Reject("the linear is packed for the CPU (freezing)")
    raise _Reject("the logit is not linear(H -> 1)")


def _match_logit(sigmoid: Node) -> tuple[Node, list[Node], _Linear]:
    """The logit node above a sigmoid, the nodes from it to the sigmoid, and the linear it is."""
    chain = [sigmoid]
    node = _source(sigmoid)
    while _is_neutral(node):
        chain.append(node)
        node = _source(node)
    chain.append(node)
    if node.op == "call_function" and node.target is aten.add.Tensor:
        return _match_biased(node, chain)
    if node.op == "call_function" and node.target in (
        aten.mul.Tensor,
        aten.div.Tensor,
        aten.sub.Tensor,
        aten.neg.default,
    ):
        raise _Reject("the logit is computed further (affine) before the sigmoid, or not linear")
    return node, chain[::-1], _match_linear(node)


def _match_biased(add: Node, chain: list[Node]) -> tuple[Node, list[Node], _Linear]:
    if add.kwargs.get("alpha", 1) != 1:
        raise _Reject("the bias is scaled")
    if not all(isinstance(n, Node) for n in add.args):
        raise _Reject("a constant is added to the logit before the sigmoid")
    problem = "something other than one bias is added to the logit"
    for linear, bias in (add.args, add.args[::-1]):
        assert isinstance(linear, Node) and isinstance(bias, Node)
        if not _numel_is_one(_tensor(bias, "the bias").shape) or not _same_shape(
            _tensor(linear, "the logit").shape, _tensor(add, "the logit").shape
        ):
            continue
        above = [linear]
        while _is_neutral(above[-1]):
            above.append(_source(above[-1]))
        try:
            found = _match_linear(above[-1])
        except _Reject as e:
            problem = str(e)
            continue
        if found.bias is not None:
            raise _Reject("two biases are added to the logit")
        if any(len(n.users) > 1 for n in above):
            raise _Reject("the logit before the bias is used elsewhere")
        return add, chain[::-1], _Linear(found.input, found.weight, _wide_source(bias))
    raise _Reject(problem)


def _match_muls(sigmoid: Node) -> tuple[list[tuple[tuple[Node, ...], Node, Node]], str]:
    """All multiplies with one gate per row, each with the nodes between sigmoid and multiply and
    the other factor; and, if there are none, why."""
    found = []
    reason = "the gate is not multiplied with anything"
    queue: list[tuple[Node, tuple[Node, ...]]] = [(sigmoid, ())]
    for node, path in queue:
        gate = _tensor(node, "the gate")
        for user in node.users:
            if _is_neutral(user) or _broadcasts_last(user):
                queue.append((user, (*path, user)))
            elif user.op == "call_function" and user.target is aten.mul.Tensor:
                a, b = user.args
                other = b if a is node else a
                if not isinstance(other, Node) or other is node or _val(other) is None:
                    reason = "the gate is multiplied by a constant or by itself"
                    continue
                problem = _broadcast_problem(
                    gate.shape, _tensor(other, "the value").shape, _tensor(user, "product").shape
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
    source, result = _val(node.args[0]), _val(node)
    return (
        source is not None
        and result is not None
        and source.dim() == result.dim() >= 1
        and _known(source.shape[-1] == 1)
        and _same_shape(source.shape[:-1], result.shape[:-1])
    )


def _broadcast_problem(gate: Any, value: Any, out: Any) -> str | None:
    """Why ``gate * value`` is not one gate per row of value, or None if it is."""
    if not _same_shape(value, out):
        return "the product is wider than the value (the gate broadcasts it)"
    if len(out) < 1 or len(gate) != len(out):
        return "the gate has fewer dimensions than the value"
    if not _same_shape(gate[:-1], out[:-1]):
        return "one gate serves several rows of the value"
    if _known(out[-1] == 1):
        return "the value is one element wide: nothing to broadcast"
    if not (_known(gate[-1] == 1) or _known(gate[-1] == out[-1])):
        return "the gate is elementwise"
    return None


def _match_addend(mul: Node) -> tuple[Node, Node, tuple[Node, ...]] | None:
    """``add(addend, mul)``, perhaps through a reshape: (add, addend, reshapes), or None."""
    node, views = mul, list[Node]()
    width = _tensor(mul, "the product").shape[-1]
    while len(node.users) == 1:
        user = next(iter(node.users))
        if user.op != "call_function":
            return None
        out = _val(user)
        if out is None or out.dtype != _tensor(mul, "the product").dtype:
            return None
        if user.target is aten.add.Tensor:
            if user.kwargs.get("alpha", 1) != 1 or len(user.args) != 2:
                return None
            a, b = user.args
            addend = b if a is node else a
            if not isinstance(addend, Node) or addend is node:
                return None
            av = _val(addend)
            if (
                av is None
                or av.dtype != out.dtype
                or av.device != out.device
                or not _same_shape(av.shape, out.shape)
                or not _same_shape(out.shape, _tensor(node, "the product").shape)
            ):
                return None
            return user, addend, tuple(views)
        if (
            user.target not in (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
            or out.dim() < 1
            or not _known(out.shape[-1] == width)
        ):
            return None
        views.append(user)
        node = user
    return None


class _Order:
    """Positions of the nodes of a graph, and of those that write to memory; built when needed."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._positions: dict[Node, int] | None = None
        self._writes: list[int] = []

    def __getitem__(self, node: Node) -> int:
        if self._positions is None:
            self._positions = {}
            mutable: dict[Any, bool] = {}
            for i, n in enumerate(self._graph.nodes):
                self._positions[n] = i
                if n.op != "call_function":
                    continue
                writes = mutable.get(n.target)
                if writes is None:
                    writes = mutable[n.target] = _writes_memory(n.target)
                if writes:
                    self._writes.append(i)
        return self._positions[node]

    def writes_between(self, first: Node, last: Node) -> bool:
        low, high = self[first], self[last]
        i = bisect.bisect_right(self._writes, low)
        return i < len(self._writes) and self._writes[i] < high


def _writes_memory(target: Any) -> bool:
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable
    if isinstance(target, torch._ops.HigherOrderOperator):
        return "functional" not in target.name()
    return target is operator.setitem


def _upstream(starts: list[Node], lowest: int, order: _Order) -> Iterator[Node]:
    """Nodes that ``starts`` depend on, themselves included, not before position ``lowest``."""
    seen: set[Node] = set()
    stack = [n for n in starts if order[n] >= lowest]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        stack.extend(n for n in node.all_input_nodes if order[n] >= lowest)


def _check_dtypes(nodes: dict[str, Node | None]) -> None:
    devices = set()
    for name, node in nodes.items():
        if node is None:
            continue
        val = _tensor(node, f"the {name}")
        if val.dtype not in _DTYPES:
            raise _Reject(f"the {name} is {str(val.dtype).removeprefix('torch.')}")
        if val.layout is not torch.strided:
            raise _Reject(f"the {name} is not a strided tensor")
        devices.add(val.device)
        if val.device.type not in _DEVICES:
            raise _Reject(f"not tried on device {val.device.type}")
    if len(devices) > 1:
        raise _Reject(f"operands are on several devices: {', '.join(sorted(map(str, devices)))}")


def _match_site(sigmoid: Node, order: _Order) -> Site:
    logit, upper, linear = _match_logit(sigmoid)
    products, reason = _match_muls(sigmoid)
    for lower, mul, value in products:
        try:
            return _site(sigmoid, logit, (*upper, *lower), linear, mul, value, order)
        except _Reject as e:
            reason = str(e)
    raise _Reject(reason)


def _site(
    sigmoid: Node,
    logit: Node,
    chain: tuple[Node, ...],
    linear: _Linear,
    mul: Node,
    value: Node,
    order: _Order,
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
    rows = _tensor(linear.input, "the input").shape[:-1]
    if not _known(math.prod(rows) == math.prod(_tensor(value, "the value").shape[:-1])):
        raise _Reject("input and value differ in their number of rows")
    if order.writes_between(_first_reader(logit, linear, order), mul):
        raise _Reject("memory is written between the linear and the multiply")
    views: tuple[Node, ...]
    anchor, addend, views = _match_addend(mul) or (mul, None, ())
    if order.writes_between(mul, anchor):
        anchor, addend, views = mul, None, ()

    inside = set(chain)
    keeps_logit = any(user not in inside and user is not mul for n in chain for user in n.users)
    if keeps_logit:
        # The op takes the place of the logit for its other users too, so none of its operands may
        # depend on it.
        def depends(nodes: list[Node]) -> bool:
            return not inside.isdisjoint(_upstream(nodes, order[logit], order))

        operands = [n for n in (linear.input, linear.weight, linear.bias, value) if n]
        if depends(operands):
            raise _Reject("the value depends on the logit")
        if addend is not None and depends([addend]):
            anchor, addend, views = mul, None, ()
        if logit_shape_op(logit, linear.input) is None:
            raise _Reject("the logit is used elsewhere, in a shape that is not one per row")
    return Site(
        sigmoid=sigmoid,
        logit=logit,
        chain=chain,
        input=linear.input,
        weight=linear.weight,
        bias=linear.bias,
        mul=mul,
        value=value,
        addend=addend,
        anchor=anchor,
        value_views=views,
        keeps_logit=keeps_logit,
    )


def _first_reader(logit: Node, linear: _Linear, order: _Order) -> Node:
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
    shape = _tensor(logit, "the logit").shape
    lead = _tensor(input, "the input").shape[:-1]
    if _same_shape(shape, [*lead, 1]):
        return aten.alias.default, ()
    if _same_shape(shape, lead):
        return aten.squeeze.dim, (-1,)
    free = [i for i, s in enumerate(shape) if not isinstance(s, int)]
    if len(free) <= 1:
        return aten.reshape.default, ([-1 if i in free else s for i, s in enumerate(shape)],)
    return None


def site_dtype(site: Site) -> torch.dtype:
    """The dtype in which the op would return the site's result."""
    dtypes = [
        None if n is None else _tensor(n, "an operand").dtype
        for n in (site.input, site.weight, site.bias, site.value, site.addend)
    ]
    return result_dtype(*dtypes)


def find_sites(graph: Graph) -> tuple[list[Site], list[Rejection]]:
    """The gates of a functional ATen graph whose nodes carry ``meta["val"]``, in graph order.

    Changes nothing; every ``aten.sigmoid`` ends in one of the two lists. Linear in the size of the
    graph.
    """
    sites: list[Site] = []
    rejections: list[Rejection] = []
    order = _Order(graph)
    taken: set[Node] = set()
    for sigmoid in graph.find_nodes(op="call_function", target=aten.sigmoid.default):
        try:
            site = _match_site(sigmoid, order)
            if site.mul in taken or any(n in taken for n in site.chain):
                raise _Reject("the product is part of another site")
        except _Reject as e:
            rejections.append(Rejection(sigmoid, str(e)))
            continue
        taken.update(site.chain, (site.mul, site.anchor))
        sites.append(site)
    return sites, rejections
