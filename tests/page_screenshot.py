"""Writes docs/images/page.png and page-dark.png anew: ``python -m tests.page_screenshot``.

Needs the extra ``browser`` and Chromium.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from tests.support.page_example import report

IMAGES = Path(__file__).parent.parent / "docs" / "images"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        page = report(width=2048).save_page(Path(folder) / "report.html")
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        for name, scheme in (("page.png", "light"), ("page-dark.png", "dark")):
            tab = browser.new_page(viewport={"width": 900, "height": 1000}, color_scheme=scheme)
            tab.goto(page.as_uri())
            height = tab.locator("#near").bounding_box()["y"] - 20
            tab.screenshot(
                path=IMAGES / name,
                full_page=True,
                clip={"x": 0, "y": 0, "width": 900, "height": height},
            )
        browser.close()


if __name__ == "__main__":
    main()
