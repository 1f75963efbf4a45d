"""Code blocks, links and headings of the project's Markdown."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_FENCE = re.compile(r"^( *)(`{3,})(\w*) *$")
_COMMENT = re.compile(r"^ *<!-- (.+) -->$")
_LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]+)\)")
_HTML_LINK = re.compile(r'(?:href|src)="([^"]+)"')
_HEADING = re.compile(r"^#{1,6} +(.+?) *#*$")


@dataclass(frozen=True)
class Block:
    """A fenced code block.

    note: the text of the HTML comment in the line before it, or "". line: of its first line in the
    file.
    """

    language: str
    code: str
    note: str
    line: int


def _split(path: Path) -> tuple[list[Block], list[str]]:
    """The code blocks of a file, and its lines of prose."""
    blocks: list[Block] = []
    prose: list[str] = []
    fence, body, start, note = None, [], 0, ""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        found = _FENCE.match(line)
        if fence is not None:
            if found and found[2] == fence[2] and not found[3]:
                indent = len(fence[1])
                code = "".join(f"{text[indent:]}\n" for text in body)
                blocks.append(Block(fence[3], code, note, start))
                fence, body, note = None, [], ""
            else:
                body.append(line)
        elif found:
            fence, start = found, number + 1
        else:
            comment = _COMMENT.match(line)
            note = comment[1] if comment else ""
            prose.append(line)
    assert fence is None, f"{path.name}: the code block at line {start - 1} does not end"
    return blocks, prose


def blocks(path: Path, language: str) -> list[Block]:
    """The code blocks in a language, such as ``"python"``."""
    return [block for block in _split(path)[0] if block.language == language]


def links(path: Path) -> list[str]:
    """Where the links and images of a file lead, code left out."""
    text = re.sub(r"`[^`\n]*`", "", "\n".join(_split(path)[1]))
    return [*_LINK.findall(text), *_HTML_LINK.findall(text)]


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives a file's headings."""
    found: set[str] = set()
    for line in _split(path)[1]:
        if not (heading := _HEADING.match(line)):
            continue
        text = re.sub(r"\]\([^)]*\)", "", heading[1]).lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        unique, n = slug, 0
        while unique in found:
            unique, n = f"{slug}-{n + 1}", n + 1
        found.add(unique)
    return found
