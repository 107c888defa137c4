"""Bounds on a request's tokens before it runs, for quotes and budget reservations. Pure.

Unlike `work_estimate`, which gives expectations, these are never too low. Image tokens are exact if the model's
replicas have reported how they read images. The router has no tokenizer, so text is bounded by a token per byte.
"""

from __future__ import annotations

from dataclasses import dataclass

from serving.billing.quotes import TokenRange
from serving.router.request.parsing import RoutedRequest
from serving.router.scheduling.work_estimate import UNKNOWN_IMAGE_TOKENS, ImageReading

_BYTES_PER_CHAR = 4
"""Of UTF-8, at most."""
_TEMPLATE_TOKENS = 16
"""The most that a chat template adds to a message, as far as is known of DeepSeek-OCR's."""


@dataclass(frozen=True, slots=True)
class TokenBounds:
    """Bounds of one request."""

    prompt: TokenRange
    """Image tokens included."""
    num_image_tokens: int | None
    """None if any part of the prompt may be images."""
    longest_answer: int | None
    """Of one choice; None if neither the request nor the model's context bounds it."""
    num_choices: int


def bound_tokens(request: RoutedRequest, reading: ImageReading, max_model_len: int) -> TokenBounds:
    """The bounds of a request.

    Args:
        request: its sizes and bounds are read.
        reading: how its images would be read.
        max_model_len: the replica's bound on prompt and answer together, in tokens; 0 if unknown. Then the tokens of
            images of unknown size are an estimate.
    """
    num_images, num_prompts = len(request.image_sizes), request.num_prompts
    text = request.num_text_chars * _BYTES_PER_CHAR + request.num_tool_bytes
    text += _TEMPLATE_TOKENS * max(1, request.num_messages, num_prompts)
    if reading.num_tokens is not None:
        prompt = TokenRange(reading.num_tokens + num_prompts, reading.num_tokens + text)
    elif max_model_len:
        prompt = TokenRange(num_prompts, num_prompts * max_model_len)
    else:
        prompt = TokenRange(num_prompts, UNKNOWN_IMAGE_TOKENS * num_images + text)
    if not max_model_len:
        return TokenBounds(prompt, reading.num_tokens, request.max_tokens, request.num_choices)
    most = num_prompts * max_model_len
    prompt = TokenRange(min(prompt.least, most), min(prompt.most, most))
    left = max(0, max_model_len - prompt.least // num_prompts)
    longest = left if request.max_tokens is None else min(request.max_tokens, left)
    return TokenBounds(prompt, reading.num_tokens, longest, request.num_choices)
