from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
import pypdfium2
import pytest
from typer.testing import CliRunner

from serving.nano.documents import DPI, PAGE_PX, BookKind, main, sample_sheet
from serving.nano.pages import LINE_PX, PITCH_PX
from serving.nano.texts import word_list
from serving.nano.training.metrics import character_error_rate


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import typer

    app = typer.Typer()
    app.command()(main)
    file = tmp_path_factory.mktemp("books") / "book.pdf"
    done = CliRunner().invoke(app, ["--out", str(file), "--pages", "3", "--seed", "5"])
    assert done.exit_code == 0, done.output
    return file


def test_the_pdf_says_what_its_text_file_says(book: Path) -> None:
    texts = json.loads(book.with_suffix(".json").read_text())
    with contextlib.closing(pypdfium2.PdfDocument(book)) as document:
        read = [document[index].get_textpage().get_text_bounded() for index in range(len(document))]
    assert [text.replace("\r\n", "\n") for text in read] == texts


def test_characters_stand_on_the_grid_at_the_service_s_resolution(book: Path) -> None:
    sheet = sample_sheet(5, 0)
    with contextlib.closing(pypdfium2.PdfDocument(book)) as document:
        pixels = np.asarray(document[0].render(scale=DPI / 72).to_pil().convert("L"))
    assert pixels.shape == (PAGE_PX, PAGE_PX)
    cells = (255 - pixels.astype(float)).reshape(PAGE_PX // LINE_PX, LINE_PX, PAGE_PX // PITCH_PX, PITCH_PX)
    ink = cells.mean(axis=(1, 3)) > 8
    said = np.zeros_like(ink)
    for row, line in enumerate(sheet.lines, sheet.top):
        for column, char in enumerate(line, sheet.left):
            said[row, column] = char not in " .,'`-_:;"  # little ink
    assert (ink >= said).all()
    assert ink.sum() <= said.sum() + sum(sheet.text.count(char) for char in ".,'`-_:;")


@pytest.mark.parametrize("kind", BookKind)
def test_pages_are_reproducible_and_within_what_was_measured(kind: BookKind) -> None:
    for index in range(20):
        sheet = sample_sheet(1, index, kind)
        assert sheet == sample_sheet(1, index, kind)
        assert 100 <= sum(map(len, sheet.lines)) <= 350
        assert len(sheet.lines) + sheet.top <= PAGE_PX // LINE_PX
        assert all(sheet.left + len(line) <= PAGE_PX // PITCH_PX for line in sheet.lines)
    assert sample_sheet(1, 0, kind) != sample_sheet(2, 0, kind)


def test_words_of_training_are_not_in_it() -> None:
    trained = set(word_list("train"))
    words = {word for index in range(20) for word in sample_sheet(1, index).text.lower().split() if len(word) > 3}
    assert not words & trained


def test_two_texts_differ() -> None:
    assert character_error_rate(sample_sheet(1, 0).text, sample_sheet(1, 1).text) > 0.5
