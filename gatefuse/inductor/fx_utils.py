"""What single nodes of a functional ATen graph do: metadata, shape operators, conversions."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Node

aten = torch.ops.aten
prims = torch.ops.prims

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""Element types whose values the op computes with exactly, in float32."""

_CONVERSIONS = {prims.convert_element_type.default, aten._to_copy.default}
VIEWS = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.alias.default,
    aten.detach.default,
}
"""Operators that keep the elements, their number and their row-major order."""

TRANSPOSES = {aten.permute.default, aten.transpose.int, aten.t.default}
_PRECISION = {torch.float16: 0, torch.bfloat16: 0, torch.float32: 1}


class NoMatch(Exception):
    """Why a pattern does not hold."""


def val_of(node: Any) -> torch.Tensor | None:
    """The fake tensor that a node stands for, or None if it is not one tensor."""
    val = node.meta.get("val") if isinstance(node, Node) else None
    return val if isinstance(val, torch.Tensor) else None


def tensor_of(node: Any, what: str) -> torch.Tensor:
    """The same; :class:`NoMatch` says that ``what`` has none."""
    val = val_of(node)
    if val is None:
        raise NoMatch(f"{what} has no tensor metadata")
    return val


def known(condition: Any) -> bool:
    """Whether a condition on sizes holds for every size; installs no guard."""
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def arguments(node: Node) -> tuple[Any, ...]:
    """The arguments of a call of an ATen operator in the order of its schema, defaults included,
    however they were passed."""
    assert isinstance(node.target, torch._ops.OpOverload)
    declared = node.target._schema.arguments
    given = node.args[: len(declared)]
    return (*given, *(node.kwargs.get(a.name, a.default_value) for a in declared[len(given) :]))


def described(node: Node) -> str:
    """What a node is, in a reason for the user."""
    if node.op == "placeholder":
        return "an input of the graph"
    name = node.target.name() if hasattr(node.target, "name") else node.target
    return getattr(name, "__name__", str(name)).replace("::", ".").removesuffix(".default")


def batch_fusion_note() -> str:
    """A hint where optional passes of Inductor's, which stack equal layers, are on."""
    from torch._inductor import config

    if config.pre_grad_fusion_options or config.post_grad_fusion_options:
        return " (perhaps by Inductor's batch fusion: pre_grad_ or post_grad_fusion_options)"
    return ""


def same_shape(a: Any, b: Any) -> bool:
    """Whether two shapes are equal for every size; installs no guard."""
    return len(a) == len(b) and all(known(x == y) for x, y in zip(a, b))


def numel_is_one(shape: Any) -> bool:
    """Whether a shape has one element for every size."""
    return all(known(s == 1) for s in shape)


def _moves_only_ones(node: Node) -> bool:
    """Whether a transpose leaves the row-major order of elements alone."""
    source = val_of(arguments(node)[0])
    if source is None:
        return False
    dims: Any = arguments(node)[1:]
    order = list(range(source.dim()))
    if node.target is aten.permute.default:
        order = [d % source.dim() for d in dims[0]]
    elif source.dim() >= 2:
        a, b = dims if node.target is aten.transpose.int else (0, 1)
        order[a], order[b] = order[b], order[a]
    kept = [d for d in order if not known(source.shape[d] == 1)]
    return kept == sorted(kept)


def is_shape_op(node: Node) -> bool:
    """An operator that keeps elements, their number and their row-major order."""
    if node.target in VIEWS or node.target is aten.clone.default:
        return True
    if node.target in TRANSPOSES:
        return _moves_only_ones(node)
    if node.target is aten.expand.default:
        source, result = val_of(arguments(node)[0]), val_of(node)
        return source is not None and result is not None and known(source.numel() == result.numel())
    return False


def is_float_conversion(node: Node) -> bool:
    """A conversion between the float types of the op, on one device."""
    if node.target not in _CONVERSIONS:
        return False
    source, result = val_of(arguments(node)[0]), val_of(node)
    return (
        source is not None
        and result is not None
        and source.dtype in FLOAT_DTYPES
        and result.dtype in FLOAT_DTYPES
        and source.device == result.device
    )


def is_neutral(node: Node) -> bool:
    """Neither computes nor reorders: shape operators, float conversions, multiplication by 1."""
    if is_shape_op(node) or is_float_conversion(node):
        return True
    return node.target is aten.mul.Tensor and arguments(node)[1] == 1


def source_of(node: Node) -> Node:
    """The first operand of a node that has a node there."""
    source = arguments(node)[0]
    assert isinstance(source, Node)
    return source


def widens(node: Node) -> bool:
    """A float conversion that keeps every value."""
    if not is_float_conversion(node):
        return False
    given, to = tensor_of(source_of(node), "a value").dtype, tensor_of(node, "a value").dtype
    return given == to or _PRECISION[given] < _PRECISION[to]


def wide_source(node: Node) -> Node:
    """Walks up through conversions that lose nothing (the op computes in float32 anyway)."""
    while widens(node):
        node = source_of(node)
    return node


def roundings(nodes: Iterable[Node]) -> tuple[torch.dtype, ...]:
    """The dtypes below float32 that a float32 value is rounded to on its way through ``nodes``."""
    dtypes = [tensor_of(node, "a node of the gate").dtype for node in nodes]
    low = [dtype for dtype in dtypes if dtype != torch.float32]
    return tuple(dtype for dtype, _ in itertools.groupby(low))


def row_source(node: Node, width: Any) -> Node | None:
    """The nearest node above, or ``node``, that has the same elements in rows of ``width``, and
    before conversions that lose nothing."""
    while (val := val_of(node)) is None or not known(val.shape[-1] == width):
        if not (is_shape_op(node) or widens(node)):
            return None
        node = source_of(node)
    return wide_source(node)


def weight_source(node: Node, width: Any) -> Node:
    """The parameter behind a weight operand: as far up as it is ``[1, width]`` or ``[width]``."""
    best = current = node
    while is_shape_op(current) or widens(current):
        current = source_of(current)
        val = val_of(current)
        if val is not None and val.dim() in (1, 2) and known(val.shape[-1] == width):
            best = current
    return best
