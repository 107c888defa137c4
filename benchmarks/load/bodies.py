"""The bodies of requests, as they go over the wire."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import orjson

from benchmarks.fastpath.reading import encode
from benchmarks.load.people import Manner, Step
from serving.nano.pages import CORE, WIDE, sample_page, with_chars

NUM_PAGES = 32
"""Rendered once each: pages differ enough that nothing could be kept from one to the next, and cost no CPU while
users come."""
_SEED = 300
_WIDE_EVERY = 4
_LARGE_EVERY = 8


@lru_cache(maxsize=NUM_PAGES)
def build_page(number: int) -> str:
    """A data URL: pages of the nano checkpoint's card, a quarter in other fonts, an eighth at twice the size."""
    spec = WIDE if number % _WIDE_EVERY == 1 else CORE
    page = sample_page(with_chars(spec, 100, 350), "test", _SEED, number)
    return encode(page, 2 if number % _LARGE_EVERY == 2 else 1)


def build_body(model: str, step: Step) -> bytes:
    """A chat request."""
    content: list[dict[str, Any]] = [{"type": "text", "text": step.prompt}]
    if step.manner is not Manner.TEXT:
        content.insert(0, {"type": "image_url", "image_url": {"url": build_page(step.page % NUM_PAGES)}})
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": step.max_tokens,
        "temperature": 0,
    }
    if step.manner is Manner.TEXT:
        body["ignore_eos"] = True  # nano was taught to say nothing without a page
    if step.manner is not Manner.WHOLE:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return orjson.dumps(body)
