"""Where a node of a graph comes from: a line of the user's source, a layer of the model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from torch.fx import Node

__all__ = ["Origin", "layers_as_text", "module_name", "origin_of", "without_folders"]

_FRAME = re.compile(r'File "(?P<path>[^"]*)", line (?P<line>\d+)(?:, in (?P<scope>.+))?')
_RESUMED = re.compile(r"torch_dynamo_resume_in_(.+)_at_\d+")
"""What Dynamo calls the rest of a function after a graph break."""


_FOLDERS = re.compile(
    r"(?P<comment>^\s*# (?:File|kernel path): ).*?[/\\](?=[^/\\:\n]+(?::\d|$))"
    r"|(?<=[\"'])(?:[A-Za-z]:[/\\]|/)[^\"'<>\n]*[/\\]"
    r"|(?<![\w.:/])(?:[A-Za-z]:[/\\]|/)(?:[\w.@+~-]+[/\\])+",
    re.MULTILINE,
)
"""Absolute paths up to the file's name: in torch's comments, in quotes, or on their own."""


class Origin(NamedTuple):
    """location: ``"file.py:12, in forward"``, without folders. line: the text of that line. layer:
    the module that was running, by its name in the model, such as ``"layers.0.mlp"``; empty for the
    model itself."""

    location: str | None = None
    line: str | None = None
    layer: str | None = None


def origin_of(*nodes: Node) -> Origin:
    """That of the first of the nodes that has one; a layer may come from a later node."""
    found = [Origin(*_source_of(node), layer_of(node)) for node in nodes]
    located = next((o for o in found if o.location), Origin())
    layer = next((o.layer for o in found if o.layer is not None), None)
    return located._replace(layer=layer)


def _source_of(node: Node) -> tuple[str | None, str | None]:
    trace = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines()]
    frames = [i for i, line in enumerate(trace) if line.startswith("File ")]
    if not frames or not (found := _FRAME.match(trace[frames[-1]])):
        return None, None
    where = f"{Path(found['path']).name}:{found['line']}"
    if scope := found["scope"]:
        where += ", in " + _RESUMED.sub(r"\1", scope)
    text = trace[frames[-1] + 1] if frames[-1] + 1 < len(trace) else None
    return where, text or None


def layer_of(node: Node) -> str | None:
    """The name of the module that made the node, as ``named_modules`` has it, or None."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
    if not stack:
        return None
    path = next(reversed(stack.values()))[0]
    return module_name(path) if isinstance(path, str) else None


def module_name(path: str) -> str:
    """``"L['self'].layers[0].mlp"``, as Dynamo writes it, is ``"layers.0.mlp"``."""
    path = re.sub(r"^L\['\w+'\]|^G\['\w+'\]|^L__\w+?___", "", path)
    path = re.sub(r"\._modules\['([^']*)'\]", r".\1", path)
    path = re.sub(r"\[['\"]?([^\]'\"]*)['\"]?\]", r".\1", path)
    path = re.sub(r"^(?:\._orig_mod|\.module(?=\.))+", "", path)
    return path.strip(".")


def layers_as_text(layers: list[str]) -> str:
    """Names of layers, those that differ in one number as a range: ``"layers.0-47.mlp"``."""
    groups: dict[tuple[str, ...], list[tuple[int, ...]]] = {}
    for layer in dict.fromkeys(layers):
        parts = re.split(r"(?<![^.])(\d+)(?![^.])", layer)
        groups.setdefault(tuple(parts[::2]), []).append(tuple(map(int, parts[1::2])))
    texts = []
    for words, numbers in groups.items():
        if len(words) != 2:
            for found in numbers:
                filled = [str(n) for n in found]
                texts.append("".join(a + b for a, b in zip(words, [*filled, ""])))
            continue
        texts.append(f"{words[0]}{_ranges(sorted(n for (n,) in numbers))}{words[1]}")
    return ", ".join(texts)


def _ranges(numbers: list[int]) -> str:
    ranges: list[list[int]] = []
    for n in numbers:
        if ranges and n == ranges[-1][-1] + 1:
            ranges[-1][1:] = [n]
        else:
            ranges.append([n])
    return ",".join("-".join(map(str, r)) for r in ranges)


def without_folders(text: str) -> str:
    """A text, or code, that tells of files by their names, not by the user's folders."""
    return _FOLDERS.sub(lambda found: found["comment"] or "", text)
