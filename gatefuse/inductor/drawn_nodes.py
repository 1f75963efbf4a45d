"""The nodes of a gate before and after the rewrite, as plain data for a drawing."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Node

from gatefuse.inductor.fx_utils import described
from gatefuse.inductor.match_gate import Site
from gatefuse.records import DrawnNode

__all__ = ["drawn_nodes"]

log = logging.getLogger("gatefuse")

_DTYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32", "float64": "f64"}
_MOST = 40
"""Nodes of one drawing; the largest gate of the tests' forms has 22."""


def drawn_nodes(
    site: Site, replaced: Mapping[Node, Node]
) -> tuple[list[DrawnNode], list[DrawnNode]]:
    """Those that the gate consists of and its operands, before and after; two empty lists where
    they cannot be told.

    replaced: what stands for which node after the rewrite. Nothing may have been erased yet.
    """

    def now(node: Node) -> Node:
        while node in replaced:
            node = replaced[node]
        return node

    names = ("input", "weight", "bias", "value", "addend")
    operands = {name: node for name in names if (node := getattr(site, name)) is not None}
    results = [site.anchor, site.logit] if site.keeps_logit else [site.anchor]
    try:
        after = {name: now(node) for name, node in operands.items()}
        return _drawn(results, operands), _drawn([now(n) for n in results], after)
    except Exception:  # a drawing is not worth a user's compilation
        log.debug("gatefuse: %s cannot be drawn", site.sigmoid, exc_info=True)
        return [], []


def _drawn(results: list[Node], operands: Mapping[str, Node]) -> list[DrawnNode]:
    roles: dict[Node, str] = {}
    for name, node in operands.items():
        roles[node] = f"{roles[node]}, {name}" if node in roles else name
    found: dict[Node, DrawnNode] = {}

    def visit(node: Node) -> None:
        if node in found or len(found) >= _MOST:
            return
        inside = node not in roles and node.op == "call_function"
        inputs = node.all_input_nodes if inside else []
        for source in inputs:
            visit(source)
        what = described(node) if inside else roles.get(node, "constant")
        found[node] = DrawnNode(node.name, what, _type(node.meta.get("val")))
        found[node].inputs = [n.name for n in inputs if n in found]

    for node in results:
        visit(node)
    return list(found.values())


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{_DTYPES.get(dtype, dtype)}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, tuple | list):
        return ", ".join(filter(None, map(_type, value)))
    return ""
