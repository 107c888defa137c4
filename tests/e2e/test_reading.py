"""The nano checkpoint reads: pages that it never saw, through the whole stack."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Sequence

import numpy as np
import openai
import pytest
from PIL import Image

from e2e.conftest import ROOT
from e2e.pages import encode, page_message
from serving.nano.pages import RenderedPage
from serving.nano.training.measure import SPECS, held_out_pages
from serving.nano.training.metrics import character_error_rate

# Seeds and words of the split "test" are never trained on. These are the pages of the model card's tables.
SEED, NUM_PAGES = 100, 100


def read(client: openai.OpenAI, image: Image.Image, mode: str, must_end: bool = True) -> str:
    answer = client.chat.completions.create(
        model="nano",
        messages=page_message(encode(image)),
        max_tokens=600,
        extra_body={"mm_processor_kwargs": {"mode": mode}},
    )
    assert not must_end or answer.choices[0].finish_reason == "stop"
    return answer.choices[0].message.content or ""


def read_all(client: openai.OpenAI, pages: Sequence[RenderedPage], num_at_once: int, mode: str = "tiny") -> list[str]:
    with concurrent.futures.ThreadPoolExecutor(num_at_once) as pool:
        return list(pool.map(lambda page: read(client, Image.fromarray(page.pixels), mode), pages))


def error_rates(client: openai.OpenAI, pages: Sequence[RenderedPage], mode: str) -> list[float]:
    texts = read_all(client, pages, 8, mode)
    return [character_error_rate(text, page.text) for text, page in zip(texts, pages, strict=True)]


@pytest.fixture(scope="module")
def pages() -> list[RenderedPage]:
    return held_out_pages(SPECS["core"], NUM_PAGES, SEED)


def test_printed_pages_are_read(client: openai.OpenAI, pages: list[RenderedPage]) -> None:
    rates = error_rates(client, pages, "tiny")
    assert float(np.mean(rates)) <= 0.004, rates  # 0.04% when it was made; a line that is missed weighs much
    assert float(np.median(rates)) == 0
    assert max(rates) <= 0.1  # 1.4% when it was made


def test_a_page_reads_the_same_alone_and_among_others(client: openai.OpenAI, pages: list[RenderedPage]) -> None:
    together = read_all(client, pages[:8], 8)
    assert together == read_all(client, pages[:8], 1)


def test_the_sample_page_is_read_to_the_letter(client: openai.OpenAI) -> None:
    with Image.open(ROOT / "serving/nano/sample.png") as image:
        assert read(client, image, "tiny") + "\n" == (ROOT / "serving/nano/sample.txt").read_text()


@pytest.mark.slow
def test_pages_in_other_fonts_and_sizes_are_read(client: openai.OpenAI) -> None:
    rates = error_rates(client, held_out_pages(SPECS["wide"], NUM_PAGES, SEED), "tiny")
    assert float(np.mean(rates)) <= 0.015, rates  # 0.76% when it was made


@pytest.mark.slow
def test_pages_are_read_in_base_mode_too(client: openai.OpenAI, pages: list[RenderedPage]) -> None:
    rates = error_rates(client, pages[:16], "base")
    assert float(np.mean(rates)) <= 0.04, rates  # 1.75% on 24 pages when it was made
