"""Resolution modes through the whole stack: chosen per request and image, and told in the answer."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from e2e.pages import build_page, encode

MODEL = "nano"
SMALL_PAGE, LARGE_PAGE = encode(build_page(400, 300)), encode(build_page(1300, 1700), "JPEG")
TOKENS = {"tiny": 73, "small": 111, "base": 273, "large": 421}
GUNDAM_2_BY_3 = 273 + 30 * 21


def ask(client: openai.OpenAI, *images: dict[str, Any], **body: Any) -> Any:
    parts = [{"type": "image_url", "image_url": image} for image in images]
    content = [*parts, {"type": "text", "text": "Free OCR."}]
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": content}],  # type: ignore[list-item, misc]
        max_tokens=1,
        extra_body=body,
    )
    assert answer.usage is not None
    return answer.usage.prompt_tokens_details


@pytest.mark.parametrize("mode", TOKENS)
def test_a_request_chooses_its_mode(client: openai.OpenAI, mode: str) -> None:
    details = ask(client, {"url": LARGE_PAGE}, mm_processor_kwargs={"mode": mode})
    assert (details.image_tokens, details.image_modes) == (TOKENS[mode], [mode])


def test_nothing_chosen_is_the_checkpoints_mode(client: openai.OpenAI) -> None:
    details = ask(client, {"url": LARGE_PAGE})
    assert (details.image_tokens, details.image_modes) == (TOKENS["tiny"], ["tiny"])


@pytest.mark.parametrize("detail", ["low", "high", "auto"])
def test_openais_detail_chooses_no_mode_that_the_checkpoint_was_not_trained_for(
    client: openai.OpenAI, detail: str
) -> None:
    details = ask(client, {"url": LARGE_PAGE, "detail": detail})
    assert (details.image_tokens, details.image_modes) == (TOKENS["tiny"], ["tiny"])


def test_every_image_of_a_request_keeps_its_own_mode(client: openai.OpenAI) -> None:
    images = [{"url": url} for url in (SMALL_PAGE, LARGE_PAGE, LARGE_PAGE, SMALL_PAGE)]
    details = ask(client, *images, mm_processor_kwargs={"mode": ["auto", "gundam", "default", "small"]})
    assert details.image_modes == ["tiny", "gundam", "tiny", "small"]
    assert details.image_tokens == TOKENS["tiny"] + GUNDAM_2_BY_3 + TOKENS["tiny"] + TOKENS["small"]


def test_an_explicit_mode_goes_before_detail(client: openai.OpenAI) -> None:
    details = ask(client, {"url": LARGE_PAGE, "detail": "high"}, mm_processor_kwargs={"mode": "base"})
    assert details.image_modes == ["base"]


def test_fewer_tiles_can_be_asked_for(client: openai.OpenAI) -> None:
    details = ask(client, {"url": LARGE_PAGE}, mm_processor_kwargs={"mode": "gundam", "max_tiles": 2})
    assert details.image_tokens == 273 + 20 * 11


@pytest.mark.parametrize("options", [{"mode": "huge"}, {"mode": ["base", "base"]}, {"max_tiles": 9, "mode": "gundam"}])
def test_a_mode_that_is_none_is_refused(client: openai.OpenAI, options: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError, match="mm_processor_kwargs"):
        ask(client, {"url": SMALL_PAGE}, mm_processor_kwargs=options)


def test_an_unknown_detail_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="detail"):
        ask(client, {"url": SMALL_PAGE, "detail": "extreme"})
