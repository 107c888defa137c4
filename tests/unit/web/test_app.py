from __future__ import annotations

import re
from typing import get_args

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient
from support.paths import ROOT

from serving.ocr_api.options import MODES, PageFormat
from serving.web.app import HEADERS, build_routes

STATIC = ROOT / "serving/web/static"
FILES = sorted(file.name for file in STATIC.iterdir())


@pytest.fixture
def browser() -> TestClient:
    return TestClient(Starlette(routes=build_routes()))


@pytest.mark.parametrize("path", ["/", "/playground/sample.png", *(f"/playground/{name}" for name in FILES)])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_every_file_is_answered_with_the_strict_headers(browser: TestClient, method: str, path: str) -> None:
    answer = browser.request(method, path)
    assert answer.status_code == 200
    assert HEADERS.items() <= dict(answer.headers).items()
    assert bool(answer.content) == (method == "GET")


def test_a_browser_that_has_a_file_does_not_load_it_again(browser: TestClient) -> None:
    etag = browser.get("/playground/app.js").headers["etag"]
    answer = browser.get("/playground/app.js", headers={"if-none-match": etag})
    assert answer.status_code == 304
    assert answer.headers["content-security-policy"] == HEADERS["content-security-policy"]


@pytest.mark.parametrize(
    "path", ["/playground/", "/playground/none.js", "/playground/../app.py", "/playground/%2e%2e/app.py"]
)
def test_nothing_else_is_given_away(browser: TestClient, path: str) -> None:
    assert browser.get(path).status_code == 404


def test_the_page_is_not_for_posting(browser: TestClient) -> None:
    assert browser.post("/").status_code == 405
    assert browser.post("/playground/app.js").status_code == 405


def test_the_policy_allows_nobody_else_and_nothing_inline() -> None:
    policy = HEADERS["content-security-policy"]
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert "http" not in policy


@pytest.mark.parametrize("name", FILES)
def test_no_file_names_another_host(name: str) -> None:
    text = (STATIC / name).read_text().replace("http://www.w3.org/2000/svg", "")  # a name space, never asked for
    assert not re.search(r"(?:https?:)?//[\w.-]+\.\w", text)


def test_the_page_has_no_inline_script_or_style() -> None:
    page = (STATIC / "index.html").read_text()
    assert all("src=" in tag for tag in re.findall(r"<script[^>]*>", page))
    assert "<style" not in page
    assert not re.search(r"\s(?:style|on\w+)=", page)


def test_every_field_has_a_label() -> None:
    page = (STATIC / "index.html").read_text()
    for tag in re.findall(r"<(?:input|select|textarea)[^>]*>", page):
        name = re.search(r'id="([\w-]+)"', tag)
        assert name
        before = page[: page.index(tag)]
        is_inside = before.rindex("<label") > before.rindex("</label>") if "</label>" in before else "<label" in before
        assert is_inside or f'for="{name[1]}"' in page, tag


def test_the_page_offers_the_modes_of_the_api_and_the_formats_that_it_can_show() -> None:
    page = (STATIC / "index.html").read_text()

    def options(name: str) -> set[str]:
        select = page.partition(f'<select id="{name}"')[2].partition("</select>")[0]
        return {value or text for value, text in re.findall(r'<option(?: value="(\w*)")?>([\w ]+)<', select)}

    assert options("mode") - {"default"} == set(MODES)
    assert options("format") == set(get_args(PageFormat)) - {"html", "hocr", "alto", "pdf"}
