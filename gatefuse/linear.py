"""Finds the linear ``H -> 1`` above a sigmoid, in each of the forms that graphs have it in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from gatefuse.nodes import (
    NoMatch,
    is_float_conversion,
    is_neutral,
    known,
    numel_is_one,
    row_source,
    same_shape,
    source_of,
    tensor_of,
    weight_source,
    wide_source,
    widens,
)

__all__ = ["Linear", "match_logit"]

aten = torch.ops.aten

_PACKED_LINEARS = ("mkldnn::_linear_pointwise", "mkl::_mkl_linear", "onednn::")


@dataclass(frozen=True)
class Linear:
    input: Node
    weight: Node
    bias: Node | None


def _unpadded(node: Node) -> Node:
    """What is padded with zeros at the ends of its dimensions, or ``node``."""
    if node.op == "call_function" and node.target is aten.constant_pad_nd.default:
        pads: Any = node.args[1]
        fill = node.args[2] if len(node.args) > 2 else 0
        if fill == 0 and all(p == 0 for p in pads[::2]) and all(p >= 0 for p in pads[1::2]):
            return source_of(node)
    return node


def _product_of_slice(node: Node) -> Node:
    """The padded matrix product that ``node`` is the first rows and columns of.

    Inductor pads products to multiples of 8 where it finds that faster (``shape_padding``).
    """
    rows = tensor_of(node, "the logit").shape
    while node.op == "call_function" and node.target is aten.slice.Tensor:
        start = node.args[2] if len(node.args) > 2 else None
        step = node.args[4] if len(node.args) > 4 else 1
        if start not in (0, None) or step != 1:
            raise NoMatch("the logit is a slice")
        node = source_of(node)
    operands: Any = {aten.mm.default: (0, 1), aten.addmm.default: (1, 2), aten.bmm.default: (0, 1)}
    if node.op != "call_function" or node.target not in operands:
        raise NoMatch("the logit is a slice")
    x, w = (_unpadded(node.args[i]) for i in operands[node.target])
    xv, wv = tensor_of(x, "the input of the linear"), tensor_of(w, "the weight")
    if not (
        same_shape(rows, [*xv.shape[:-1], wv.shape[-1]]) and known(xv.shape[-1] == wv.shape[-2])
    ):
        raise NoMatch("the logit is a slice")
    return node


def _linear_of_mm(x: Node, w: Node, bias: Node | None, sliced: bool) -> Linear:
    if sliced:
        x, w = _unpadded(x), _unpadded(w)
    xv, wv = tensor_of(x, "the input of the linear"), tensor_of(w, "the weight")
    if not known(wv.shape[-1] == 1):
        raise NoMatch(f"the linear has {wv.shape[-1]} outputs, not 1")
    width = xv.shape[-1]
    return Linear(wide_source(x), weight_source(w, width), bias)


def _match_sum(node: Node) -> Linear:
    """``sum(input * weight)`` over the width: coordinate descent and handwritten code."""
    product: Any = node.args[0]
    dims: Any = node.args[1] if len(node.args) > 1 else None
    while is_float_conversion(product) and widens(product):
        product = source_of(product)
    if product.op != "call_function" or product.target is not aten.mul.Tensor:
        raise NoMatch("the logit is not linear(H -> 1)")
    pv = tensor_of(product, "the product")
    if not isinstance(dims, (list, tuple)) or len(dims) != 1:
        raise NoMatch("the logit is a sum over more than one dimension")
    dim: int = dims[0] % pv.dim()
    if not all(known(s == 1) for s in pv.shape[dim + 1 :]):
        raise NoMatch("the logit is a sum over a dimension that is not the last")
    width = pv.shape[dim]
    for x, w in (product.args, product.args[::-1]):
        if not isinstance(x, Node) or not isinstance(w, Node):
            raise NoMatch("the logit is not linear(H -> 1)")
        xv, wv = tensor_of(x, "the input of the linear"), tensor_of(w, "the weight")
        if not same_shape(xv.shape, pv.shape):
            continue
        w_dims = [1] * (pv.dim() - wv.dim()) + list(wv.shape)
        if not known(w_dims[dim] == width):
            continue
        if not all(known(s == 1) for d, s in enumerate(w_dims) if d != dim):
            continue
        input = row_source(x, width)
        if input is None:
            raise NoMatch("the input's rows are not in its last dimension")
        return Linear(input, weight_source(w, width), None)
    raise NoMatch("the logit is a sum of products, but neither factor is one row of weights")


def _match_linear(node: Node) -> Linear:
    """The linear that ``node`` is, without a bias added afterwards, or NoMatch."""
    if node.op != "call_function":
        raise NoMatch("the logit is an input of the graph")
    sliced = node.target is aten.slice.Tensor
    if sliced:
        node = _product_of_slice(node)
    target, args = node.target, node.args
    if target is aten.mm.default:
        return _linear_of_mm(args[0], args[1], None, sliced)  # type: ignore[arg-type]
    if target is aten.addmm.default:
        if node.kwargs.get("beta", 1) != 1 or node.kwargs.get("alpha", 1) != 1:
            raise NoMatch("the linear is scaled (addmm with alpha or beta)")
        bias = args[0]
        assert isinstance(bias, Node)
        linear = _linear_of_mm(args[1], args[2], bias, sliced)  # type: ignore[arg-type]
        if not numel_is_one(tensor_of(bias, "the bias").shape):
            raise NoMatch("the bias differs from row to row")
        return linear
    if target is aten.mv.default:
        x, w = args
        assert isinstance(x, Node) and isinstance(w, Node)
        return Linear(wide_source(x), weight_source(w, tensor_of(x, "the input").shape[-1]), None)
    if target is aten.bmm.default:
        x, w = args
        assert isinstance(x, Node) and isinstance(w, Node)
        if w.op == "call_function" and w.target is aten.expand.default:
            w = source_of(w)  # one weight for all batches
        weight = tensor_of(w, "the weight")
        if weight.dim() == 3 and not known(weight.shape[0] == 1):
            raise NoMatch("the logit is a batched product with one weight per batch")
        return _linear_of_mm(x, w, None, sliced)
    if target is aten.sum.dim_IntList:
        return _match_sum(node)
    if any(str(target).startswith(p.replace("::", ".")) for p in _PACKED_LINEARS):
        raise NoMatch("the linear is packed for the CPU (freezing)")
    raise NoMatch("the logit is not linear(H -> 1)")


def match_logit(sigmoid: Node) -> tuple[Node, list[Node], Linear]:
    """The logit node above a sigmoid, the nodes from it to the sigmoid, and the linear it is."""
    chain = [sigmoid]
    node = source_of(sigmoid)
    while is_neutral(node):
        chain.append(node)
        node = source_of(node)
    chain.append(node)
    if node.op == "call_function" and node.target is aten.add.Tensor:
        return _match_biased(node, chain)
    if node.op == "call_function" and node.target in (
        aten.mul.Tensor,
        aten.div.Tensor,
        aten.sub.Tensor,
        aten.neg.default,
    ):
        raise NoMatch("the logit is computed further (affine) before the sigmoid, or not linear")
    return node, chain[::-1], _match_linear(node)


def _match_biased(add: Node, chain: list[Node]) -> tuple[Node, list[Node], Linear]:
    if add.kwargs.get("alpha", 1) != 1:
        raise NoMatch("the bias is scaled")
    if not all(isinstance(n, Node) for n in add.args):
        raise NoMatch("a constant is added to the logit before the sigmoid")
    problem = "something other than one bias is added to the logit"
    for linear, bias in (add.args, add.args[::-1]):
        assert isinstance(linear, Node) and isinstance(bias, Node)
        if not numel_is_one(tensor_of(bias, "the bias").shape) or not same_shape(
            tensor_of(linear, "the logit").shape, tensor_of(add, "the logit").shape
        ):
            continue
        above = [linear]
        while is_neutral(above[-1]):
            above.append(source_of(above[-1]))
        try:
            found = _match_linear(above[-1])
        except NoMatch as e:
            problem = str(e)
            continue
        if found.bias is not None:
            raise NoMatch("two biases are added to the logit")
        if any(len(n.users) > 1 for n in above):
            raise NoMatch("the logit before the bias is used elsewhere")
        return add, chain[::-1], Linear(found.input, found.weight, wide_source(bias))
    raise NoMatch(problem)
