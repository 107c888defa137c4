"""The playground in a real Chromium, which tells of everything that it should not do."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Request, expect, sync_playwright

from support.paths import ROOT

ARTEFACTS = ROOT / ".artefacts"
"""Screenshots are kept here, and are in no commit."""
_CHROMIUM = "/usr/bin/chromium"
_WAIT_MS = 30_000


@dataclass
class Visit:
    """One tab at the playground."""

    page: Page
    origin: str
    complaints: list[str] = field(default_factory=list)
    """Errors on the console (breaches of the content-security policy are among them) and of scripts."""
    strangers: list[str] = field(default_factory=list)
    """Requests to anybody else."""

    def choose(self, file: Path | dict[str, Any]) -> None:
        self.page.locator("#file").set_input_files(file)  # type: ignore[arg-type]

    def read(self) -> None:
        self.page.get_by_role("button", name="Read", exact=True).click()

    def expect_status(self, words: str) -> None:
        expect(self.page.locator("#status")).to_contain_text(words, timeout=_WAIT_MS)

    def text(self, number: int = 1) -> str:
        return self.page.get_by_label(f"Text of page {number}", exact=True).inner_text()

    def keep(self, name: str, *, is_whole: bool = True) -> Path:
        ARTEFACTS.mkdir(exist_ok=True)
        self.page.screenshot(path=ARTEFACTS / f"{name}.png", full_page=is_whole)
        return ARTEFACTS / f"{name}.png"


@contextlib.contextmanager
def run_chromium() -> Iterator[Browser]:
    if shutil.which(_CHROMIUM) is None:
        assert "CI" not in os.environ, "chromium is missing"
        pytest.skip("chromium is not installed (apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=_CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def visit(browser: Browser, url: str, **settings: Any) -> Iterator[Visit]:
    """A tab of its own, in which nothing may be complained of when it closes."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, **settings)
    visit = Visit(context.new_page(), url)

    def note(request: Request) -> None:
        if not request.url.startswith((f"{url}/", "data:", f"blob:{url}/")):
            visit.strangers.append(request.url)

    visit.page.on("request", note)
    visit.page.on("pageerror", lambda error: visit.complaints.append(str(error)))
    visit.page.on("console", lambda m: visit.complaints.append(m.text) if m.type in ("error", "warning") else None)
    try:
        visit.page.goto(f"{url}/")
        yield visit
    finally:
        context.close()
    assert visit.complaints == []
    assert visit.strangers == []
