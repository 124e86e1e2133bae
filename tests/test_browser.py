"""The fixture `browser` sees what a page logs, asks for, and throws."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from browser import visit

if TYPE_CHECKING:
    from playwright.sync_api import Browser

PAGE = """<!doctype html><title>x</title><img src="http://example.org/a.png"><p>text</p>
<script>console.error("said"); setTimeout(() => { throw new Error("thrown"); })</script>"""


def test_errors_and_requests_of_a_page_are_seen_and_none_leaves(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(PAGE)
    with visit(browser, width=390, height=700, dark=True) as seen:
        page = seen.open(tmp_path / "page.html")
        assert page.inner_text("p") == "text"
        page.wait_for_timeout(50)
        assert page.evaluate("[innerWidth, matchMedia('(prefers-color-scheme: dark)').matches]") == [390, True]
    assert "said" in seen.errors and "thrown" in seen.errors
    assert seen.left == ["http://example.org/a.png"]
    assert seen.requests[0].startswith("file:")
