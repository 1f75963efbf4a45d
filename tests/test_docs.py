"""The documentation's links lead somewhere, its code is valid, and what can be run is run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gatefuse
from tests.support import markdown
from tests.support.comparison import INSTALLED
from tests.support.programs import REPOSITORY

LAYERS, GATES = 24, 2  # gates of the model in the examples, and of the one they are run on here
PAGES = sorted(
    path for folder in ("", "docs/", "benchmarks/") for path in REPOSITORY.glob(f"{folder}*.md")
)
IDS = [path.relative_to(REPOSITORY).as_posix() for path in PAGES]
BLOCKS = [
    pytest.param(page, block, id=f"{name}:{block.line}")
    for page, name in zip(PAGES, IDS, strict=True)
    for block in markdown.blocks(page, "python")
]


def test_the_pages_are_found() -> None:
    assert {"README.md", "docs/usage.md", "docs/recipes.md"} <= set(IDS)
    assert len(BLOCKS) > 10


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for link in markdown.links(page):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            assert target.suffix == ".md", f"{link}: an anchor of a file that has no headings"
            assert anchor in markdown.anchors(target), link


def test_links_in_prose_and_headings_are_read(tmp_path: Path) -> None:
    """The reader of the tests above sees what GitHub sees."""
    page = tmp_path / "page.md"
    page.write_text(
        "# A `name`, and [more](x.md#y)\n![plot](a.svg) [`code`](b.py) `[no](c.md)`\n"
        "```python\n[no](d.md)\n# no heading\n```\n## Twice\n## Twice\n"
    )
    assert markdown.links(page) == ["x.md#y", "a.svg", "b.py"]
    assert markdown.anchors(page) == {"a-name-and-more", "twice", "twice-1"}


class Gated(nn.Module):
    """The smallest model with some gates, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.ModuleList(nn.Linear(8, 1, bias=False) for _ in range(GATES))
        self.expert = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for gate in self.gates:
            x = torch.sigmoid(gate(x)) * self.expert(x)
        return x


@pytest.mark.parametrize(("page", "block"), BLOCKS)
def test_code_is_valid(page: Path, block: markdown.Block) -> None:
    compile(block.code, str(page), "exec")


RUN = [
    case
    for case in BLOCKS
    if not str(case.id).startswith("docs/recipes.md")  # run by tests/recipes
]


@pytest.mark.skipif(not INSTALLED, reason="gatefuse is not installed, so its backend has no name")
@pytest.mark.parametrize(("page", "block"), RUN)
def test_code_runs(
    page: Path, block: markdown.Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the names that the pages use: a model, its input, its number of gates."""
    monkeypatch.chdir(tmp_path)
    model, tokens = Gated(), torch.randn(4, 8)
    names: dict[str, Any] = dict(torch=torch, gatefuse=gatefuse, model=model, tokens=tokens)
    names |= dict(gates=GATES, compiled_model=compiled(model), report=gatefuse.Report())
    text = block.code.replace(f"expect={LAYERS}", f"expect={GATES}")
    text = text.replace(f'expect": {LAYERS}', f'expect": {GATES}')
    code = compile("\n" * (block.line - 1) + text, str(page), "exec")
    try:
        exec(code, names)
    except ModuleNotFoundError as error:
        if error.name in ("gatefuse", "torch"):
            raise
        pytest.skip(f"{error.name} is not installed")
    if names["model"] is not model:  # what the block compiled works, and has its gates fused
        with torch.no_grad(), gatefuse.record() as report:
            names["model"](tokens)
        assert report.fused == GATES, report


def compiled(model: nn.Module) -> Callable[..., Any]:
    return torch.compile(model, backend="gatefuse")


def test_the_site_has_every_page() -> None:
    """Each page of docs/ is in the site's navigation."""
    navigation = (REPOSITORY / "mkdocs.yml").read_text().partition("nav:")[2].partition("\n\n")[0]
    named = set(re.findall(r": (\S+\.md)$", navigation, re.M))
    assert {path.name for path in (REPOSITORY / "docs").glob("*.md")} <= named


def test_the_site_builds(tmp_path: Path) -> None:
    """In strict mode, in which a broken link or anchor is an error; links to source files lead to
    the repository."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    environment = os.environ | {"REPOSITORY_URL": "https://host/owner/name"}
    environment |= {"REPOSITORY_REF": "main", "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "reliability" / "index.html").read_text()
    assert 'href="https://host/owner/name/blob/main/tests/test_forms.py"' in text
    reference = (tmp_path / "reference" / "index.html").read_text()
    for name in set(gatefuse.__all__):
        written_by_hand = f'id="gatefuse{name}"'  # a heading of the page itself
        assert f'id="gatefuse.{name}"' in reference or written_by_hand in reference, name
    assert (tmp_path / "images" / "summary.svg").is_file()
