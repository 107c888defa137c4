"""The page in Chromium, with a service behind it that keeps to the contract and reads nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect
from support.browser import Visit, run_chromium, visit
from support.ocr_service_double import OcrDouble, run_double

from serving.nano.documents import sample_sheet, write_document


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with run_chromium() as browser:
        yield browser


@pytest.fixture
def service() -> Iterator[OcrDouble]:
    with run_double() as double:
        yield double


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("books") / "book.pdf"
    write_document(file, [sample_sheet(1, index) for index in range(3)])
    return file


@pytest.fixture
def tab(browser: Browser, service: OcrDouble) -> Iterator[Visit]:
    with visit(browser, service.url) as tab:
        yield tab


def test_a_document_is_read_while_one_watches(tab: Visit, service: OcrDouble, book: Path) -> None:
    service.page_s = 1.5
    tab.choose(book)
    tab.read()
    # Text and boxes arrive while the first page is still being read.
    expect(tab.page.locator("[data-state=reading] pre").first).to_contain_text("# Page", timeout=30_000)
    expect(tab.page.locator("[data-state=reading] svg rect").first).to_be_attached()
    assert "<|" not in tab.text()
    tab.expect_status("Done: 3 of 3 pages read.")
    assert [tab.text(number) for number in (1, 2, 3)] == ["# Page 1", "# Page 2", "# Page 3"]
    assert tab.page.locator("svg rect").count() == 6
    assert re.fullmatch(r"[\d,]+", tab.page.locator("#rate").inner_text())
    assert re.fullmatch(r"\d+\.\d\d s", tab.page.locator("#first").inner_text())
    assert tab.page.locator("#cost").inner_text() == "$0.000030"
    assert tab.page.locator("#ratio").inner_text() == "0.4×"
    tab.keep("playground-light")


def test_boxes_lie_where_they_belong_on_the_picture(tab: Visit, book: Path) -> None:
    tab.choose(book)
    tab.read()
    tab.expect_status("Done")
    picture = tab.page.locator(".view img").first
    assert picture.evaluate("image => image.naturalWidth") == 512
    box = tab.page.locator("svg rect").first.bounding_box()
    place = picture.bounding_box()
    assert box
    assert place
    # The double's first box begins at (51, 26) of a page of 512 pixels a side.
    assert (box["x"] - place["x"]) / place["width"] == pytest.approx(51 / 512, abs=0.01)
    assert (box["y"] - place["y"]) / place["height"] == pytest.approx(26 / 512, abs=0.01)
    tab.page.locator(".block").first.focus()
    expect(tab.page.locator("svg rect").first).to_have_class(re.compile("marked"))


def test_the_keyboard_is_enough(tab: Visit, book: Path) -> None:
    page = tab.page
    # Chromium is told to hand the dialogue over when the first listener comes, on another way than the keys take: one
    # that came with the key could be too late. The questions below make certain that this one is not.
    page.on("filechooser", lambda chooser: None)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "theme"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "file"
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Space")
    chooser.value.set_files(book)
    tab.expect_status("book.pdf is chosen")
    for name in ("sample", "model", "mode", "format"):
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == name
    page.keyboard.press("m")  # markdown
    for name in ("pages", "dpi", "prompt", "key", "read"):
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == name
        if name == "pages":
            page.keyboard.type("2-3")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    tab.expect_status("Done: 2 of 2 pages read.")
    assert tab.text(2) == "# Page 2"


def test_escape_stops_the_reading(tab: Visit, service: OcrDouble, book: Path) -> None:
    service.page_s = 20
    tab.choose(book)
    tab.read()
    tab.expect_status("Reading 3 pages")
    tab.page.keyboard.press("Escape")
    tab.expect_status("Stopped")
    expect(tab.page.get_by_role("button", name="Read", exact=True)).to_be_enabled()


def test_a_key_opens_a_closed_service(browser: Browser, service: OcrDouble, book: Path) -> None:
    service.key = "sk-1"
    with visit(browser, service.url) as tab:
        tab.page.locator("#model").fill("nano")
        tab.choose(book)
        tab.read()
        expect(tab.page.get_by_role("alert")).to_contain_text("Type an API key")
        assert tab.page.evaluate("document.activeElement.id") == "key"
        tab.page.keyboard.type("sk-1")
        tab.page.keyboard.press("Enter")
        tab.expect_status("Done: 3 of 3")
        # Kept for this tab, and never in what outlives it.
        assert tab.page.evaluate("sessionStorage.getItem('key')") == "sk-1"
        assert "sk-1" not in tab.page.evaluate("JSON.stringify(localStorage)")
        assert "sk-1" not in tab.page.url
        # The browser itself writes every 401 on the console.
        assert all("401" in text for text in tab.complaints)
        tab.complaints.clear()


def test_pages_that_fail_are_told(tab: Visit, service: OcrDouble, book: Path) -> None:
    service.bad_pages = {2}
    tab.choose(book)
    tab.read()
    tab.expect_status("Done: 2 of 3 pages read, 1 failed.")
    assert tab.text(2) == "The page is damaged."


def test_an_answer_that_breaks_off_is_told(tab: Visit, service: OcrDouble, book: Path) -> None:
    service.breaks_after = 5
    tab.choose(book)
    tab.read()
    expect(tab.page.get_by_role("alert")).to_be_visible()
    tab.expect_status("Not read")
    tab.complaints.clear()  # the browser tells of the broken connection


def test_what_cannot_be_read_is_told(tab: Visit) -> None:
    tab.choose({"name": "x.pdf", "mimeType": "application/pdf", "buffer": b"no document"})
    tab.read()
    expect(tab.page.get_by_role("alert")).to_have_text("This is no document that can be read.")
    assert all("400" in text for text in tab.complaints)
    tab.complaints.clear()


def test_markup_in_an_answer_stays_text(tab: Visit, service: OcrDouble, book: Path) -> None:
    async def read(fields: dict[str, str], number: int) -> dict[str, object]:
        return {**await plain(fields, number), "markdown": "<img src=x onerror=alert(1)><script>1</script>"}

    plain = service.read_page
    service.read_page = read  # type: ignore[method-assign]
    tab.choose(book)
    tab.read()
    tab.expect_status("Done")
    assert tab.text().startswith("<img src=x")
    assert tab.page.locator("pre img").count() == 0


def test_the_sample_can_be_read_and_the_text_saved(tab: Visit) -> None:
    tab.page.get_by_role("button", name="Use the sample page").click()
    tab.expect_status("sample.png is chosen")
    expect(tab.page.locator("#thumbnail")).to_be_visible()
    tab.page.keyboard.press("Control+Enter")
    tab.expect_status("Done: 1 of 1 page read.")
    with tab.page.expect_download() as download:
        tab.page.get_by_role("button", name="Save").click()
    assert download.value.suggested_filename == "sample.md"
    assert Path(download.value.path()).read_text() == "# Page 1\n"


def test_a_document_can_be_dropped(tab: Visit, book: Path) -> None:
    transfer = tab.page.evaluate_handle(
        """() => {
            const transfer = new DataTransfer();
            transfer.items.add(new File(["%PDF-1.4"], "dropped.pdf", {type: "application/pdf"}));
            return transfer;
        }"""
    )
    tab.page.dispatch_event("#drop", "drop", {"dataTransfer": transfer})
    tab.expect_status("dropped.pdf is chosen")


def test_dark_follows_the_system_and_the_switch(browser: Browser, service: OcrDouble, book: Path) -> None:
    paper = "getComputedStyle(document.documentElement).backgroundColor"
    with visit(browser, service.url, color_scheme="dark") as tab:
        dark = tab.page.evaluate(paper)
        switch = tab.page.locator("#theme")
        expect(switch).to_have_attribute("aria-pressed", "true")
        tab.choose(book)
        tab.read()
        tab.expect_status("Done")
        tab.keep("playground-dark")
        switch.click()
        light = tab.page.evaluate(paper)
        assert light != dark
        tab.page.reload()
        assert tab.page.evaluate(paper) == light
    with visit(browser, service.url, color_scheme="light") as tab:
        assert tab.page.evaluate(paper) == light


def test_a_small_screen_needs_no_sideways_scrolling(browser: Browser, service: OcrDouble, book: Path) -> None:
    with visit(browser, service.url) as tab:
        tab.page.set_viewport_size({"width": 360, "height": 740})
        tab.choose(book)
        tab.read()
        tab.expect_status("Done")
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= 360
        tab.keep("playground-small")


def test_everything_to_press_or_fill_has_a_name(tab: Visit) -> None:
    named = tab.page.locator("button, input, select, textarea")
    for index in range(named.count()):
        expect(named.nth(index)).to_have_accessible_name(re.compile(r"\S"))
