"""Estimates a request's work in tokens before it runs, for admission and load balancing. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from serving.cluster.directory import ReplicaRecord
from serving.plugin.modes.selection import OPTIONS, ModeRules, ModeSelectionError
from serving.router.request.parsing import RoutedRequest

UNKNOWN_IMAGE_TOKENS = 903
"""Assumed for an image whose size or mode only the engine will know: an A4 page in gundam mode (a global view and a
grid of 2 x 3 tiles)."""
CHARS_PER_TOKEN = 3
"""Characters of prompt text counted as one token. English prose has about four, code and other scripts fewer; too low
an estimate would put more on a replica than its KV cache holds."""
TEXT, MIXED, UNKNOWN = "text", "mixed", "unknown"
"""Labels of requests without images, with images in several modes, and with images in unknown modes."""

_MAX_CACHED_CHARS = 32  # clients write the options: what is cached of them must be small
_SMOOTHING = 0.05  # weight of one answer: about the last twenty make the forecast

_Frozen = tuple[tuple[str, str | int | tuple[str, ...]], ...]


@dataclass(frozen=True, slots=True)
class WorkEstimate:
    """What a request is expected to take on a replica, in tokens."""

    prompt_tokens: int
    """Image tokens included."""
    output_tokens: int
    """Of all choices together."""

    @property
    def total(self) -> int:
        return self.prompt_tokens + self.output_tokens


@dataclass(frozen=True, slots=True)
class ImageReading:
    """How a replica reads the images of a request."""

    modes: tuple[str, ...] = ()
    """Resolution mode of every image; empty if only the engine will know."""
    num_tokens: int | None = None
    """Image tokens of all of them; None if only the engine will know."""
    label: str = UNKNOWN
    """The key under which answers to such requests are averaged."""


_NO_IMAGES = ImageReading((), 0, TEXT)
_UNKNOWN_IMAGES = ImageReading()


def read_images(request: RoutedRequest, replica: ReplicaRecord | None) -> ImageReading:
    """How a replica would read the images of a request; None is a replica about which nothing is known yet.

    Cached by page sizes and options, since a scanner sends many equal pages.
    """
    sizes = request.image_sizes
    if not sizes:
        return _NO_IMAGES
    if replica is None or replica.image_config is None or None in sizes:
        return _UNKNOWN_IMAGES
    asked, server = _freeze(request.image_options), _freeze_pairs(replica.image_options)
    if asked is None or server is None:
        return _read(replica.image_config, request.image_options, dict(replica.image_options), sizes)
    return _read_cached(replica.image_config, asked, server, sizes)


@lru_cache(maxsize=4096)
def _read_cached(
    image_config: tuple[tuple[str, Any], ...],
    asked: _Frozen,
    server: _Frozen,
    sizes: tuple[tuple[int, int] | None, ...],
) -> ImageReading:
    return _read(image_config, dict(asked), dict(server), sizes)


def _read(
    image_config: tuple[tuple[str, Any], ...],
    asked: Mapping[str, Any],
    server: Mapping[str, Any],
    sizes: tuple[tuple[int, int] | None, ...],
) -> ImageReading:
    known = [size for size in sizes if size is not None]
    try:
        chosen = _rules(image_config).choose(asked, server, known)
    except ModeSelectionError:
        return _UNKNOWN_IMAGES  # the engine refuses it with its own message
    modes = tuple(choice.name for choice in chosen)
    num_tokens = sum(choice.mode.num_tokens(*size) for choice, size in zip(chosen, known, strict=True))
    return ImageReading(modes, num_tokens, modes[0] if len(set(modes)) == 1 else MIXED)


@lru_cache(maxsize=64)
def _rules(image_config: tuple[tuple[str, Any], ...]) -> ModeRules:
    return ModeRules.from_config(dict(image_config))


def _freeze(options: Mapping[str, Any]) -> _Frozen | None:
    return _freeze_pairs(tuple(options.items())) if options else ()


def _freeze_pairs(options: tuple[tuple[str, Any], ...]) -> _Frozen | None:
    """The options as a cache key; None if they are unusual. True, 1 and 1.0 are equal keys but not equally valid
    options, so only whole numbers and short strings are accepted."""
    frozen: list[tuple[str, str | int | tuple[str, ...]]] = []
    for name, value in options:
        kept = tuple(value) if isinstance(value, list | tuple) else value
        parts = kept if isinstance(kept, tuple) else (kept,)
        is_plain = all(
            type(part) is int or (isinstance(part, str) and len(part) <= _MAX_CACHED_CHARS) for part in parts
        )
        if name not in OPTIONS or not is_plain:
            return None
        frozen.append((name, kept))
    return tuple(frozen)


@dataclass(slots=True)
class OutputForecast:
    """Expected answer lengths: a moving average by model and label, per image if there are images.

    The answer to a page is its text, so answers grow with the number of pages.
    """

    prior: float
    """Tokens of a page or a text answer, until some have been observed."""
    _means: dict[tuple[str, str], float] = field(default_factory=dict)

    def expect(self, model: str, label: str, num_images: int) -> float:
        """Expected tokens in the answer of one choice."""
        return self._means.get((model, label), self.prior) * (num_images or 1)

    def observe(self, model: str, label: str, num_images: int, num_tokens: float) -> None:
        """Add the length of one choice's answer to the average. Both keys come from small sets, so memory is
        bounded."""
        key = (model, label)
        mean = self._means.get(key, self.prior)
        self._means[key] = mean + _SMOOTHING * (num_tokens / (num_images or 1) - mean)


def estimate_work(
    request: RoutedRequest, reading: ImageReading, forecast: OutputForecast, max_model_len: int = 0
) -> WorkEstimate:
    """The expected work of a request.

    Args:
        request: its sizes and bounds are read.
        reading: how its images would be read.
        forecast: expected answer lengths.
        max_model_len: the replica's bound on prompt and answer together, in tokens; 0 is none. An engine refuses a
            longer prompt without running it, so no prompt counts for more.
    """
    num_images = len(request.image_sizes)
    image_tokens = UNKNOWN_IMAGE_TOKENS * num_images if reading.num_tokens is None else reading.num_tokens
    prompt = image_tokens + request.num_text_chars // CHARS_PER_TOKEN + 1
    output = forecast.expect(request.model, reading.label, num_images)
    if request.max_tokens is not None and request.max_tokens < output:
        output = request.max_tokens
    if max_model_len:
        prompt = min(prompt, max_model_len)
        output = min(output, max_model_len - prompt)
    return WorkEstimate(prompt, max(1, round(output)) * max(1, request.num_choices))
