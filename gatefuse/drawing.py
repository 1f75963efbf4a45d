"""Draws the nodes of a gate as SVG: operands above, the result at the bottom.

Each rank is one step of the computation. The longest chain runs straight down; other inputs stand
beside it, on the side on which the operator takes them. An operand is drawn at each of its uses.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

from gatefuse.records import DrawnNode

__all__ = ["svg"]

_WIDTH, _HEIGHT, _GAP_X, _GAP_Y, _MARGIN = 122, 44, 10, 26, 3
_LETTERS = 18
"""Of a box's text, in one line."""


@dataclass
class _Box:
    node: DrawnNode
    rank: int
    column: float

    @property
    def x(self) -> int:
        return int(self.column * (_WIDTH + _GAP_X))


def svg(nodes: Sequence[DrawnNode], title: str) -> str:
    """The drawing, as an inline SVG element; empty without nodes.

    nodes: each after those that it reads. title: what it shows, for those who do not see it.
    Colours are the page's: classes ``operator``, ``operand``, ``ours`` (the op), ``edge``, ``tip``.
    """
    boxes, edges = _place({n.name: n for n in nodes})
    if not boxes:
        return ""
    left = min(b.x for b in boxes)
    deepest = max(b.rank for b in boxes)
    width = max(b.x for b in boxes) - left + _WIDTH + 2 * _MARGIN
    height = (deepest + 1) * (_HEIGHT + _GAP_Y) - _GAP_Y + 2 * _MARGIN

    def corner(box: _Box) -> tuple[int, int]:
        return box.x - left + _MARGIN, (deepest - box.rank) * (_HEIGHT + _GAP_Y) + _MARGIN

    parts = [_edge(corner(a), corner(b)) for a, b in edges]
    parts += [_box(b.node, *corner(b)) for b in boxes]
    words = "; ".join(
        f"{n.operator} of {', '.join(n.inputs)} gives {n.name}" for n in nodes if n.inputs
    )
    return (
        f'<svg role="img" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f"<title>{escape(title)}</title><desc>{escape(words)}</desc>{''.join(parts)}</svg>"
    )


def _place(nodes: dict[str, DrawnNode]) -> tuple[list[_Box], list[tuple[_Box, _Box]]]:
    """Boxes in ranks from the result (0) up, and the edges between them."""
    users: dict[str, list[str]] = {name: [] for name in nodes}
    height: dict[str, int] = {}
    for name, node in nodes.items():
        height[name] = 1 + max((height[i] for i in node.inputs), default=-1)
        for source in node.inputs:
            users[source].append(name)
    boxes: dict[str, _Box] = {}
    edges: list[tuple[_Box, _Box]] = []
    taken = set[tuple[int, float]]()

    def box(name: str, places: Iterable[tuple[int, float]]) -> _Box:
        place = next(p for p in places if p not in taken)
        taken.add(place)
        return _Box(nodes[name], *place)

    def main_and_sides(user: DrawnNode) -> list[tuple[str, int]]:
        """Its inputs, each with the side on which it stands: left -1, right 1, above 0."""
        main = max(range(len(user.inputs)), key=lambda i: height[user.inputs[i]], default=0)
        return [(name, (i > main) - (i < main)) for i, name in enumerate(user.inputs)]

    columns: dict[str, tuple[float, int]] = {}
    for name in reversed(nodes):
        if users[name] and not nodes[name].inputs:
            continue  # an operand
        rank = max((boxes[u].rank + 1 for u in users[name]), default=0)
        column, step = columns.get(name, (0, 1))
        boxes[name] = box(name, ((rank, column + step * i) for i in itertools.count()))
        edges += [(boxes[name], boxes[u]) for u in users[name]]
        for source, side in main_and_sides(nodes[name]):
            if side == 0 or source not in columns:
                columns[source] = (boxes[name].column + side, side or 1)
    operands = []
    for user in boxes.values():
        only_operands = not any(nodes[i].inputs for i in user.node.inputs)
        for i, (source, side) in enumerate(main_and_sides(user.node)):
            if not nodes[source].inputs:
                row = [_in_rows(user, i, len(user.node.inputs))] if only_operands else []
                operands.append(box(source, itertools.chain(row, _beside(user, side))))
                edges.append((operands[-1], user))
    return [*boxes.values(), *operands], edges


def _in_rows(user: _Box, index: int, of: int) -> tuple[int, float]:
    """The place of an operand of a node that has nothing but operands: three in the row above it,
    further ones above the gaps between those."""
    if of <= 3 or index < 3:
        return user.rank + 1, user.column + index - (min(of, 3) - 1) / 2
    return user.rank + 2, user.column + index - 3.5


def _beside(user: _Box, side: int) -> Iterator[tuple[int, float]]:
    """Where an operand may stand next to a node's other inputs, the best place first."""
    rank = user.rank + 1
    yield rank, user.column + side
    yield rank, user.column - side
    yield from ((rank, user.column + (side or 1) * i) for i in itertools.count(2))


def _edge(start: tuple[int, int], end: tuple[int, int]) -> str:
    (x0, y0), (x1, y1) = start, end
    x0, y0, x1 = x0 + _WIDTH // 2, y0 + _HEIGHT, x1 + _WIDTH // 2
    bend = _GAP_Y // 2 + 2
    path = f"M{x0} {y0}"
    if y1 - y0 > _GAP_Y:  # past a rank: where boxes may be in the way, beside them
        side = x0 + (_WIDTH + _GAP_X) // 2 if x0 == x1 else x0
        path += f"C{x0} {y0 + bend} {side} {y0 + bend // 2} {side} {y0 + _GAP_Y}V{y1 - _GAP_Y}"
        x0 = side
    path += f"C{x0} {y1 - _GAP_Y + bend} {x1} {y1 - bend} {x1} {y1 - 5}"
    return (
        f'<path class="edge" d="{path}"/>'
        f'<path class="tip" d="M{x1 - 4} {y1 - 6}L{x1} {y1}L{x1 + 4} {y1 - 6}Z"/>'
    )


def _box(node: DrawnNode, x: int, y: int) -> str:
    ours = node.operator.startswith("gatefuse.")
    kind = "ours" if ours else "operator" if node.inputs else "operand"
    label = node.operator
    if node.inputs:  # without namespace and overload
        label = re.sub(r"^(?:aten|prims|gatefuse)\.(\w+).*", r"\1", label)
        label = label.replace("convert_element_type", "convert")
    middle = x + _WIDTH // 2
    fit = f' textLength="{_WIDTH - 12}" lengthAdjust="spacingAndGlyphs"' if len(label) > 15 else ""
    return (
        f'<g class="{kind}"><title>{escape(f"{node.name}: {node.operator}")}</title>'
        f'<rect x="{x}" y="{y}" width="{_WIDTH}" height="{_HEIGHT}" rx="7"/>'
        f'<text x="{middle}" y="{y + 18}"{fit}>{escape(_short(label))}</text>'
        f'<text class="type" x="{middle}" y="{y + 34}">{escape(_short(node.type))}</text></g>'
    )


def _short(text: str) -> str:
    return text if len(text) <= _LETTERS else f"{text[: _LETTERS - 1]}…"
