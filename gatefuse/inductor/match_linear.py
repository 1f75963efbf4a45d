"""Finds the linear ``H -> 1`` above a sigmoid, in each of the forms that graphs have it in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from gatefuse.inductor.fx_utils import (
    NoMatch,
    arguments,
    batch_fusion_note,
    described,
    is_neutral,
    known,
    numel_is_one,
    roundings,
    row_source,
    same_shape,
    source_of,
    tensor_of,
    weight_source,
    wide_source,
    widens,
)
from gatefuse.inductor.match_sigmoid import Sigmoid

__all__ = ["LOGIT_IS_INPUT", "PACKED", "Linear", "match_logit"]

aten = torch.ops.aten

Shape = Sequence[int | torch.SymInt]

_PACKED_LINEARS = ("mkldnn._linear_pointwise", "mkl._mkl_linear", "onednn.")
PACKED = "the linear is packed for the CPU (freezing)"


@dataclass(frozen=True)
class Linear:
    """product_roundings, sum_roundings: what the unfused graph rounds each product to, and their
    sum before the bias is added."""

    input: Node
    weight: Node
    bias: Node | None
    product_roundings: tuple[torch.dtype, ...] = ()
    sum_roundings: tuple[torch.dtype, ...] = ()


def _unpadded(node: Node) -> Node:
    """What is padded with zeros at the ends of its dimensions, or ``node``."""
    while node.target is aten.constant_pad_nd.default:
        _, pads, fill = arguments(node)
        if fill != 0 or any(p != 0 for p in pads[::2]) or any(p < 0 for p in pads[1::2]):
            break
        node = source_of(node)
    return node


def _before_slices(node: Node) -> Node:
    """What ``node`` is the first rows and columns of.

    Inductor pads products to multiples of 8 where it finds that faster (``shape_padding``).
    """
    while node.target is aten.slice.Tensor:
        _, _, start, _, step = arguments(node)
        if start not in (0, None) or step != 1:
            raise NoMatch("the logit is a slice")
        node = source_of(node)
        if len(node.users) > 1:
            # It would be computed all the same, as in training, where it is saved.
            raise NoMatch("the logit is a slice of a product that is needed elsewhere")
    return node


def _linear_of_mm(x: Node, w: Node, bias: Node | None, cut_to: Shape | None) -> Linear:
    """cut_to: the shape to which the product, of padded operands, is sliced."""
    if cut_to is not None:
        x, w = _unpadded(x), _unpadded(w)
    xv, wv = tensor_of(x, "the input of the linear"), tensor_of(w, "the weight")
    if cut_to is not None and not (
        same_shape(cut_to, [*xv.shape[:-1], wv.shape[-1]]) and known(xv.shape[-1] == wv.shape[-2])
    ):
        raise NoMatch("the logit is a slice")
    if not known(wv.shape[-1] == 1):
        raise NoMatch(f"the linear has {wv.shape[-1]} outputs, not 1")
    width = xv.shape[-1]
    return Linear(wide_source(x), weight_source(w, width), bias)


def _match_sum(node: Node) -> Linear:
    """``sum(input * weight)`` over the width: coordinate descent and handwritten code."""
    product, dims, *_ = arguments(node)
    while widens(product):
        product = source_of(product)
    if product.target is not aten.mul.Tensor:
        raise _not_linear(product)
    pv = tensor_of(product, "the product")
    if not isinstance(dims, (list, tuple)) or len(dims) != 1:
        raise NoMatch("the logit is a sum over more than one dimension")
    dim: int = dims[0] % pv.dim()
    if not all(known(s == 1) for s in pv.shape[dim + 1 :]):
        raise NoMatch("the logit is a sum over a dimension that is not the last")
    width = pv.shape[dim]
    factors = arguments(product)
    if not all(isinstance(factor, Node) for factor in factors):
        raise NoMatch(f"{_NOT_LINEAR}: it is a sum of products with a constant")
    for x, w in (factors, factors[::-1]):
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
        return Linear(input, weight_source(w, width), None, product_roundings=roundings([product]))
    raise NoMatch("the logit is a sum of products, but neither factor is one row of weights")


def _match_linear(node: Node, cut_to: Shape | None = None) -> Linear:
    """The linear that ``node`` is, without a bias added afterwards, or NoMatch."""
    if node.op != "call_function":
        raise NoMatch(LOGIT_IS_INPUT)
    target = node.target
    if str(target).startswith(_PACKED_LINEARS):
        raise NoMatch(PACKED)
    if not isinstance(target, torch._ops.OpOverload):
        raise _not_linear(node)
    args = arguments(node)
    if target is aten.mm.default:
        return _linear_of_mm(args[0], args[1], None, cut_to)
    if target is aten.addmm.default:
        bias, x, w, beta, alpha = args
        if beta != 1 or alpha != 1:
            raise NoMatch("the linear is scaled (addmm with alpha or beta)")
        linear = _linear_of_mm(x, w, bias, cut_to)
        if not numel_is_one(tensor_of(bias, "the bias").shape):
            raise NoMatch("the bias differs from row to row")
        return linear
    if cut_to is not None and target is not aten.bmm.default:
        raise NoMatch("the logit is a slice")
    if target is aten.mv.default:
        x, w = args
        return Linear(wide_source(x), weight_source(w, tensor_of(x, "the input").shape[-1]), None)
    if target is aten.bmm.default:
        x, w = args[:2]
        weight = tensor_of(w, "the weight")
        if w.target is aten.expand.default:
            one = tensor_of(source_of(w), "the weight")
            if same_shape(one.shape[-2:], weight.shape[-2:]):
                w, weight = source_of(w), one  # one weight for all batches
        if weight.dim() == 3 and not known(weight.shape[0] == 1):
            raise NoMatch("the logit is a batched product with one weight per batch")
        return _linear_of_mm(x, w, None, cut_to)
    if target is aten.sum.dim_IntList:
        return _match_sum(node)
    raise _not_linear(node)


_NOT_LINEAR = "the logit is not linear(H -> 1)"

LOGIT_IS_INPUT = "the logit is an input of the graph"
"""The reason for a sigmoid whose logit another graph has computed, as of most in a backward."""


def _not_linear(node: Node) -> NoMatch:
    return NoMatch(f"{_NOT_LINEAR}: it comes from {described(node)}{batch_fusion_note()}")


def match_logit(sigmoid: Sigmoid) -> tuple[Node, list[Node], Linear]:
    """The logit node above a sigmoid, the nodes from it to the sigmoid, and the linear it is."""
    chain = [sigmoid.gate, *sigmoid.inside]
    node = sigmoid.source
    while is_neutral(node):
        chain.append(node)
        node = source_of(node)
    chain.append(node)
    logit, cut_to = node, None
    if node.target is aten.slice.Tensor:
        cut_to = tensor_of(node, "the logit").shape
        node = _before_slices(node)
    if node.target is aten.add.Tensor:
        linear = _match_biased(node, cut_to)
    elif node.target in (
        aten.mul.Tensor,
        aten.div.Tensor,
        aten.sub.Tensor,
        aten.neg.default,
    ):
        problem = "the logit is computed further (affine) before the sigmoid, or not linear"
        raise NoMatch(f"{problem}: {described(node)}")
    else:
        linear = _match_linear(node, cut_to)
    return logit, chain[::-1], linear


def _match_biased(add: Node, cut_to: Shape | None) -> Linear:
    a, b, alpha = arguments(add)
    if alpha != 1:
        raise NoMatch("the bias is scaled")
    if not isinstance(b, Node):
        raise NoMatch("a constant is added to the logit before the sigmoid")
    problem = "something other than one bias is added to the logit"
    for linear, bias in ((a, b), (b, a)):
        if not numel_is_one(tensor_of(bias, "the bias").shape) or not same_shape(
            tensor_of(linear, "the logit").shape, tensor_of(add, "the logit").shape
        ):
            continue
        above = [linear]
        while is_neutral(above[-1]):
            above.append(source_of(above[-1]))
        try:
            found = _match_linear(above[-1], cut_to)
        except NoMatch as e:
            problem = str(e)
            continue
        if found.bias is not None:
            raise NoMatch("two biases are added to the logit")
        if any(len(n.users) > 1 for n in above):
            raise NoMatch("the logit before the bias is used elsewhere")
        return replace(found, bias=wide_source(bias), sum_roundings=roundings(above[::-1]))
    raise NoMatch(problem)
