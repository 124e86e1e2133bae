"""A headless Chromium for tests of pages: what a visitor sees, what the console says, what leaves the machine.

The browser is the distribution's (`apt-get install chromium`), or the program that `VIDEOADAPT_CHROMIUM` names.
Playwright drives it. Playwright's own browsers are not needed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Route

PROGRAMS = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome")
START_MS = 180_000  # a busy machine needs a minute for what a quiet one does in a second
# Then two frames: an observer looks at what is in view once a frame.
SHOW = """(element) => new Promise((done) => {
    element.scrollIntoView({block: "center"});
    requestAnimationFrame(() => requestAnimationFrame(done));
})"""
LOCAL = ("127.0.0.1", "localhost", "[::1]", "::1")


def find() -> str | None:
    """Returns the path of a Chromium, or None."""
    if named := os.environ.get("VIDEOADAPT_CHROMIUM"):
        return named
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


@contextmanager
def launched(program: str) -> Iterator[Browser]:
    """Yields a running headless browser. While it runs, asyncio has a running loop in this thread."""
    from playwright.sync_api import sync_playwright  # noqa: PLC0415 - not installed everywhere

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, timeout=START_MS)
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Visit:
    """One page, and what happened on it."""

    page: Page
    errors: list[str] = field(default_factory=list)  # messages of level error, and exceptions that nothing caught
    requests: list[str] = field(default_factory=list)  # every address that the page asked for, the page's own first
    left: list[str] = field(default_factory=list)  # those of another machine; each was refused

    def open(self, address: Path | str) -> Page:
        """Opens a file or an address and waits until it has loaded."""
        self.page.goto(address.resolve().as_uri() if isinstance(address, Path) else address)
        return self.page

    def scroll_through(self, selector: str) -> None:
        """Brings every element into view once, in the order of the page. Hidden ones stay hidden."""
        for element in self.page.query_selector_all(selector):  # the list is fixed, also where empty ones are filled
            element.evaluate(SHOW)

    def _listen(self) -> None:
        self.page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.context.route("**/*", self._route)

    def _route(self, route: Route) -> None:
        parts = urlsplit(route.request.url)
        if parts.scheme in ("file", "data", "blob") or parts.hostname in LOCAL:
            route.continue_()
        else:
            self.left.append(route.request.url)
            route.abort()


@contextmanager
def visit(
    browser: Browser, *, width: int = 1440, height: int = 900, dark: bool = False, **options: Any
) -> Iterator[Visit]:
    """Yields a fresh page, with nothing kept of the pages before it.

    Args:
        browser: The fixture `browser`.
        width: Of the window, in CSS pixels.
        height: Of the window, in CSS pixels.
        dark: Whether the visitor prefers dark pages.
        options: Further ones of playwright's `Browser.new_context`.
    """
    viewport: Any = {"width": width, "height": height}
    context = browser.new_context(viewport=viewport, color_scheme="dark" if dark else "light", **options)
    context.set_default_timeout(START_MS)
    try:
        seen = Visit(context.new_page())
        seen._listen()
        yield seen
    finally:
        context.close()
