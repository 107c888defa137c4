import numpy as np
import pytest

from serving.nano.pages import CORE, FONT_FILES, LINE_PX, PITCH_PX, WIDE, PageSpec, find_font, sample_page, with_chars
from serving.nano.texts import sample_lines, word_list

SPECS = {"core": CORE, "wide": WIDE}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_page_is_a_function_of_seed_and_index(spec: PageSpec) -> None:
    first, again, other = (sample_page(spec, "train", 3, index) for index in (7, 7, 8))
    assert np.array_equal(first.pixels, again.pixels)
    assert first.text == again.text
    assert not np.array_equal(first.pixels, other.pixels)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("index", range(5))
def test_boxes_hold_the_ink(spec: PageSpec, index: int) -> None:
    page = sample_page(spec, "train", 0, index)
    lines = page.text.split("\n")
    assert len(page.line_boxes) == len(lines)
    assert page.pixels.shape == (512, 512)
    assert page.pixels.dtype == np.uint8
    middle = (page.style.paper + page.style.ink) / 2
    outside = page.pixels < middle
    for line, (left, top, right, bottom) in zip(lines, page.line_boxes, strict=True):
        assert (page.pixels[top:bottom, left:right] < middle).any(), line
        assert 0 <= left < right <= 512
        assert bottom - top <= LINE_PX
        outside[max(0, top - 6) : bottom + 6, max(0, left - 6) : right + 6] = False
    assert outside.mean() < 1e-3


def test_centers_follow_the_text() -> None:
    page = sample_page(CORE, "train", 0, 1)
    assert page.centers.shape == (len(page.text), 2)
    for index, char in enumerate(page.text[:-1]):
        step = page.centers[index + 1] - page.centers[index]
        assert step[0] == PITCH_PX if char != "\n" else step[1] > LINE_PX / 2


def test_lengths_stay_in_the_asked_range() -> None:
    for index in range(10):
        text = sample_page(with_chars(CORE, 100, 350), "test", 0, index).text
        assert 100 <= len(text.replace("\n", "")) <= 350
        assert text.count("\n") < 14
        assert all(line and line == line.rstrip() for line in text.split("\n"))


def test_test_words_are_held_out() -> None:
    assert not set(word_list("train")) & set(word_list("test"))
    assert len(word_list("test")) > 200


def test_an_impossible_specification_is_refused() -> None:
    with pytest.raises(ValueError, match="no page fits"):
        sample_page(with_chars(CORE, 5000, 6000), "train", 0, 0)


def test_lines_are_printable_ascii() -> None:
    random = np.random.default_rng(0)
    text = "".join("".join(sample_lines(random, "train", 10, 30)) for _ in range(20))
    assert text.isascii()
    assert text.isprintable()


def test_fonts_come_from_the_package() -> None:
    assert all(find_font(name).is_file() for name in FONT_FILES)
