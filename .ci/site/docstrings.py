"""An extension of griffe: docstrings as Markdown.

gatefuse's docstrings are prose, with reStructuredText's roles (`:func:`) and, for each argument or
field, `name: what it is`.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|mod|data|meth):`~?([\w.]+)`")
_MEMBER = re.compile(r"(?:^|(?<=\. ))(\w+(?:, \w+)*): ", re.M)


class Docstrings(griffe.Extension):
    """Roles become links within the page, arguments and fields a list."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of one object of gatefuse."""
        if obj.docstring is None or not obj.path.startswith("gatefuse"):
            return
        names = _members(obj)
        text = _ROLE.sub(_link, obj.docstring.value)
        paragraphs: list[str] = []
        for paragraph in re.split(r"\n\s*\n", text):
            parts = _MEMBER.split(paragraph)
            fields = [set(name.split(", ")) <= names for name in parts[1::2]]
            if fields and not parts[0].strip() and all(fields):
                entries = zip(parts[1::2], parts[2::2], strict=True)
                paragraphs += [f"- `{name}`: {' '.join(what.split())}" for name, what in entries]
            else:
                paragraphs.append(paragraph)
        obj.docstring.value = "\n\n".join(paragraphs)


def _members(obj: griffe.Object) -> set[str]:
    if isinstance(obj, griffe.Function):
        return {parameter.name.lstrip("*") for parameter in obj.parameters}
    return set(obj.members)


def _link(role: re.Match[str]) -> str:
    name = role[1]
    if not name.startswith("gatefuse."):
        return f"`{name}`"
    return f"[`{name}`][{name}]"
