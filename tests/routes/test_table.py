"""The table of docs/reliability.md names tests and files that exist, and every test of a route."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.support.programs import REPOSITORY

PAGE = REPOSITORY / "docs" / "reliability.md"


def names_of_tests(path: Path) -> set[str]:
    body = ast.parse(path.read_text()).body
    return {n.name for n in body if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")}


def test_every_route_has_its_row() -> None:
    named = set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE.read_text()))
    assert named
    for file, test in named:
        assert test in names_of_tests(REPOSITORY / file), f"{file}::{test}"
    for path in Path(__file__).parent.glob("test_*.py"):
        if path.name != Path(__file__).name:
            file = path.relative_to(REPOSITORY).as_posix()
            assert {(file, test) for test in names_of_tests(path)} <= named, file


def test_links_lead_to_files() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", PAGE.read_text())
    assert links
    for link in links:
        assert (PAGE.parent / link).exists(), link
