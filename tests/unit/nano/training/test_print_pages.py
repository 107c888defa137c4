import json
import re
from dataclasses import replace

import numpy as np
import pytest
from tokenizers import Tokenizer

from serving.nano.print_tokens import build_tokenizer_json, decode_ids
from serving.nano.texts import word_list
from serving.nano.training.batches import encode_print
from serving.nano.training.fonts import MONO, PROPORTIONAL, UNSEEN, Font, check_fonts
from serving.nano.training.plan import Plan
from serving.nano.training.print_pages import FREE, PrintPage, sample_print

pytestmark = pytest.mark.usefixtures("fonts")

CLEAN = replace(FREE, noise_share=0.0, jpeg_share=0.0, blur_share=0.0, turned_share=0.0, ruled_share=0.0)
TURNED = replace(CLEAN, turned_share=1.0)


def ink_of(page: PrintPage) -> np.ndarray:
    paper, ink = int(page.pixels.max()), int(page.pixels.min())
    return (paper - page.pixels.astype(np.float32)) / (paper - ink)


@pytest.mark.parametrize("index", range(8))
def test_all_ink_is_in_the_boxes_of_the_glyphs_and_every_box_has_ink(index: int) -> None:
    page = sample_print(CLEAN, "train", 0, index)
    ink = ink_of(page)
    outside = ink.copy()
    for char, box in zip(page.text, page.boxes.astype(int), strict=True):
        left, top, right, bottom = np.clip(box, 0, 512)
        if char in " \n":
            assert not box.any()
            continue
        outside[top:bottom, left:right] = 0
        if right - left >= 2 and bottom - top >= 2:
            assert ink[top:bottom, left:right].max() > 0.1, char
    assert outside.max() < 0.02


@pytest.mark.parametrize("index", range(8))
def test_centres_stand_in_the_glyphs(index: int) -> None:
    page = sample_print(CLEAN, "train", 1, index)
    assert len(page.centers) == len(page.text) + 1
    size = page.setting.size_px
    for char, (x, y), (left, top, right, bottom) in zip(page.text, page.centers, page.boxes, strict=False):
        if char not in " \n":
            assert left - 0.25 * size <= x <= right + 0.25 * size, char
            assert top - size <= y <= bottom + size, char


def test_centres_turn_with_the_page() -> None:
    for index in range(6):
        page = sample_print(TURNED, "train", 2, index)
        straight = sample_print(replace(CLEAN, turned_share=0.0), "train", 2, index)
        assert page.turn != 0
        assert page.text == straight.text
        # The middle of the ink turns as the middle of the centres does.
        rows, columns = np.mgrid[:512, :512] + 0.5
        moved = []
        for one in (straight, page):
            ink = ink_of(one)
            moved.append(np.array([(ink * columns).sum(), (ink * rows).sum()]) / ink.sum())
        printed = [place for place, char in enumerate(page.text) if char not in " \n"]
        by_centres = page.centers[printed].mean(0) - straight.centers[printed].mean(0)
        assert np.abs(moved[1] - moved[0] - by_centres).max() < 1.0


@pytest.mark.parametrize("index", range(12))
def test_tokens_decode_to_the_text(index: int) -> None:
    page = sample_print(FREE, "train", 3, index)
    ids = encode_print(page)
    assert decode_ids(ids) == page.text
    tokenizer = Tokenizer.from_str(json.dumps(build_tokenizer_json()))
    assert tokenizer.decode(ids) == page.text


def test_text_is_lines_of_words_with_single_spaces() -> None:
    for index in range(30):
        text = sample_print(FREE, "train", 4, index).text
        assert re.fullmatch(r"[!-~]+( [!-~]+)*(\n[!-~]+( [!-~]+)*)*", text)


def test_held_out_words_are_never_trained_on() -> None:
    held_out = {word for word in word_list("test") if len(word) >= 6}
    trained = " ".join(sample_print(FREE, "train", 5, index).text.lower() for index in range(60))
    assert not held_out & set(re.findall(r"[a-z]+", trained))
    measured = " ".join(sample_print(FREE, "test", 5, index).text.lower() for index in range(20))
    assert held_out & set(re.findall(r"[a-z]+", measured))


def test_a_page_is_a_function_of_its_number() -> None:
    first, second = (sample_print(FREE, "train", 6, 17) for _ in range(2))
    assert first.text == second.text
    assert np.array_equal(first.pixels, second.pixels)
    assert sample_print(FREE, "train", 6, 18).text != first.text


def test_pages_are_of_many_kinds() -> None:
    pages = [sample_print(FREE, "train", 7, index) for index in range(80)]
    assert len({page.setting.font for page in pages}) > 20
    assert {page.setting.size_px for page in pages} == set(range(16, 31))
    assert len({int(page.centers[0, 0]) % 64 for page in pages}) > 25
    assert any(page.setting.is_kerned for page in pages)
    assert any(page.turn for page in pages)


@pytest.mark.parametrize("step", range(6))
def test_a_steps_pages_are_no_longer_than_its_room(step: int) -> None:
    spec = Plan().spec(step, is_dense=False)
    assert all(len(sample_print(spec, "train", step, index).text) <= spec.num_chars[1] for index in range(10))


def test_unseen_fonts_are_not_trained_on() -> None:
    assert len({*MONO, *PROPORTIONAL}) >= 20
    assert not {*MONO, *PROPORTIONAL} & {*UNSEEN}


def test_a_font_that_is_missing_is_named_with_what_to_install() -> None:
    with pytest.raises(FileNotFoundError, match=r"liberation2/None\.ttf: install Debian's .*fonts-liberation2"):
        check_fonts([Font("liberation", "None.ttf")])
