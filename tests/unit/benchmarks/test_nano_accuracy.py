"""The pages of free print that a checkpoint is judged by, and what is made of what was read."""

from __future__ import annotations

import ast
import inspect
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pypdfium2
import pytest
from PIL import Image
from rich.console import Console

import benchmarks.nano_pages
from benchmarks.nano_accuracy import Measured, Reader, Reading, build_tables, count_changes, measure, tidy
from benchmarks.nano_pages import SETS, Sheet, draw, held_out_share


def draw_or_skip(name: str, index: int) -> Sheet:
    try:
        return draw(name, 1, index)
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", [name for name in SETS if name != "E"])
def test_pictures_show_their_text_and_nothing_beyond_the_page(name: str) -> None:
    for index in range(4):
        sheet = draw_or_skip(name, index)
        pixels = np.asarray(Image.open(io.BytesIO(sheet.data)))
        assert pixels.shape == (512, 512)
        assert 60 < len(sheet.text) < 450
        assert sheet.text == tidy(sheet.text)
        assert (pixels < 128).sum() > 10 * len(sheet.text.replace(" ", ""))
        if name not in ("core", "wide"):
            assert pixels[:, -3:].mean() > 200


def test_a_pdf_has_its_text_in_reading_order() -> None:
    sheet = draw_or_skip("E", 0)
    page = pypdfium2.PdfDocument(sheet.data)[0]
    assert tidy(page.get_textpage().get_text_bounded().replace("\r\n", "\n")) == sheet.text
    assert page.get_size() == pytest.approx((595.28, 841.89), abs=0.1)


def test_a_page_is_a_function_of_set_seed_and_index() -> None:
    assert draw_or_skip("A", 3) == draw_or_skip("A", 3)
    assert draw_or_skip("A", 3).text != draw_or_skip("A", 4).text
    assert draw_or_skip("A", 3).text != draw_or_skip("B", 3).text


@pytest.mark.parametrize("name", list(SETS))
def test_words_are_those_that_training_never_saw(name: str) -> None:
    texts = [draw_or_skip(name, index).text for index in range(5)]
    # Random letters of the old sets, and labels such as Total, may happen to be words of the other split.
    assert held_out_share(" ".join(texts)) > (0.8 if name in ("A", "B", "E", "core", "wide") else 0.6)


def test_the_renderer_shares_no_code_with_training() -> None:
    modules = {
        node.module
        for node in ast.walk(ast.parse(inspect.getsource(benchmarks.nano_pages)))
        if isinstance(node, ast.ImportFrom) and node.module
    }
    assert not [name for name in modules if name.startswith("serving.nano.training")]


SHEETS = [Sheet("abcd efgh", b"", "image/png"), Sheet("1234567890", b"", "image/png"), Sheet("xyz", b"", "image/png")]
ANSWERS = {"abcd efgh": ("abcd  efgh\n", 9), "1234567890": ("123456789", 9), "xyz": ("q" * 480, 480)}


def read(sheet: Sheet, mode: str) -> tuple[str, int]:
    return ANSWERS[sheet.text]


def test_a_set_is_measured_page_by_page() -> None:
    found = measure(read, "A", "tiny", SHEETS, 2, Console(quiet=True))
    assert found.rates.tolist() == [0.0, 0.1, 160.0]
    row = found.to_json()
    assert (row["num_exact"], row["num_over_10_percent"], row["num_endless"]) == (1, 1, 1)
    assert row["noise_tokens"] == 480
    assert row["compression"] == pytest.approx(22 / 3 / 64)


def test_there_is_no_noise_where_all_was_read() -> None:
    assert Measured("A", "tiny", [Reading(SHEETS[0], "abcd efgh", 9)], 1.0).noise_tokens is None


def test_answers_that_change_in_a_batch_are_counted() -> None:
    seen: list[str] = []

    def drifting(sheet: Sheet, mode: str) -> tuple[str, int]:
        seen.append(sheet.text)
        return ("other" if seen.count(sheet.text) == 2 and sheet.text == "xyz" else sheet.text), 1

    assert count_changes(drifting, "tiny", SHEETS, 3) == 1
    assert count_changes(read, "tiny", SHEETS, 3) == 0


def test_tables_show_every_set_and_every_length() -> None:
    one = Measured("A", "tiny", [Reading(SHEETS[0], "abcd efgh", 9), Reading(SHEETS[1], "123456789", 9)], 2.0)
    console = Console(width=200)
    with console.capture() as shown:
        for table in build_tables([one]):
            console.print(table)
    text = shown.get()
    assert "5.00%" in text
    assert "10.00%" in text
    assert "95.0%" in text
    assert "0-49" in text


class _Chat(BaseHTTPRequestHandler):
    bodies: list[dict[str, Any]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.bodies.append({**body, "authorization": self.headers["authorization"]})
        message = {"role": "assistant", "content": "abcd efgh"}
        answer = json.dumps({"choices": [{"message": message}], "usage": {"completion_tokens": 9}}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def chat() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    bodies: list[dict[str, Any]] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Chat", (_Chat,), {"bodies": bodies}))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", bodies
    server.shutdown()
    thread.join()
    server.server_close()


def test_pictures_are_read_over_http(chat: tuple[str, list[dict[str, Any]]]) -> None:
    url, bodies = chat
    reader = Reader(url, "secret", "mine")
    assert reader.read(Sheet("abcd efgh", b"picture", "image/png"), "base") == ("abcd efgh", 9)
    reader.close()
    (body,) = bodies
    assert (body["model"], body["temperature"], body["authorization"]) == ("mine", 0, "Bearer secret")
    assert body["mm_processor_kwargs"] == {"mode": "base"}
    picture, prompt = body["messages"][0]["content"]
    assert picture["image_url"]["url"] == "data:image/png;base64,cGljdHVyZQ=="
    assert prompt["text"] == "Free OCR."
