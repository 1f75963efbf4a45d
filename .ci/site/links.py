"""A hook of MkDocs: links out of docs/ go to other pages of the site, or else to the repository.

The pages are written for GitHub, where `../tests/test_forms.py` is a file of the repository.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/RESULTS.md")
"""Files that are pages of the site although they are not in docs/."""

_LINK = re.compile(r"(?<=\]\()([^()\s#]+)(#[^()\s]*)?(?=\))")
_CODE = re.compile(r"^(`{3,}).*?^\1 *$|`[^`\n]+`", re.M | re.S)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/."""
    for path in PAGES:
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def _in_repository(uri: str) -> str:
    return uri if uri in PAGES else f"docs/{uri}"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point each relative link at a page of the site, or else at the repository."""
    here = posixpath.dirname(_in_repository(page.file.src_uri))
    pages = {_in_repository(file.src_uri): file.src_uri for file in files}

    def target(link: re.Match[str]) -> str:
        path, anchor = link[1], link[2] or ""
        if re.match(r"[a-z]+:", path):
            return link[0]
        path = posixpath.normpath(posixpath.join(here, path))
        if path in pages:
            start = posixpath.dirname(page.file.src_uri)
            return posixpath.relpath(pages[path], start or ".") + anchor
        if not (ROOT / path).exists():
            return link[0]  # MkDocs will warn of it
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        branch = os.environ.get("REPOSITORY_REF", "main")
        # A build at home, which knows no repository, links to the files on this machine.
        base = f"{config.repo_url}/{kind}/{branch}" if config.repo_url else ROOT.as_uri()
        return f"{base}/{path}{anchor}"

    def outside_code(text: str) -> str:
        return _LINK.sub(target, text)

    parts, end = [], 0
    for code in _CODE.finditer(markdown):
        parts += [outside_code(markdown[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*parts, outside_code(markdown[end:])])
