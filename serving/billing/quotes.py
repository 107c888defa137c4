"""Quotes: what a request would cost, before it runs. Pure; the result bounds what will be billed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from serving.billing.prices import Price, format_dollars, parse_dollars


@dataclass(frozen=True, slots=True)
class TokenRange:
    """From `least` to `most`, both inclusive."""

    least: int
    most: int

    def __post_init__(self) -> None:
        if not 0 <= self.least <= self.most:
            raise ValueError(f"not a range: {self.least} to {self.most}")


@dataclass(frozen=True, slots=True)
class Quote:
    """A request's tokens and what they would cost, in whole nanodollars."""

    prompt_tokens: TokenRange
    num_image_tokens: int
    completion_tokens: TokenRange
    nanodollars: TokenRange
    price_version: str


def quote(
    price: Price,
    *,
    prompt_tokens: TokenRange,
    num_image_tokens: int,
    max_tokens: int,
    num_choices: int = 1,
    can_be_cached: bool = False,
) -> Quote:
    """The range of a request's cost.

    `prompt_tokens` includes image tokens; it is a range since the router has no tokenizer. `max_tokens` bounds each of
    the `num_choices` answers, which may also be empty. `can_be_cached` means that the model's replicas keep a prefix
    cache, which may contain all of the prompt.
    """
    completion = TokenRange(0, max_tokens * num_choices)

    def cost(num_prompt: int, num_completion: int, num_cached: int) -> int:
        return price.cost_nanodollars(
            num_prompt_tokens=num_prompt,
            num_completion_tokens=num_completion,
            num_image_tokens=num_image_tokens,
            num_cached_tokens=num_cached,
        )

    # Cached tokens may be more expensive than others: both ends are covered either way.
    caches = (0, prompt_tokens.most) if can_be_cached else (0,)
    least = min(cost(prompt_tokens.least, completion.least, cached) for cached in caches)
    most = max(cost(prompt_tokens.most, completion.most, cached) for cached in caches)
    return Quote(prompt_tokens, num_image_tokens, completion, TokenRange(least, most), price.version)


def sum_quotes(quotes: Sequence[Quote]) -> Quote:
    """The sum of several quotes, with the first one's price version; empty without quotes."""
    return Quote(
        _sum([each.prompt_tokens for each in quotes]),
        sum(each.num_image_tokens for each in quotes),
        _sum([each.completion_tokens for each in quotes]),
        _sum([each.nanodollars for each in quotes]),
        quotes[0].price_version if quotes else "",
    )


def _sum(ranges: Sequence[TokenRange]) -> TokenRange:
    return TokenRange(sum(each.least for each in ranges), sum(each.most for each in ranges))


def quote_to_json(model: str, found: Quote) -> dict[str, Any]:
    """The quote as the API returns it."""
    least, most = found.nanodollars.least, found.nanodollars.most
    return {
        "object": "quote",
        "model": model,
        "prompt_tokens": _show(found.prompt_tokens),
        "image_tokens": found.num_image_tokens,
        "completion_tokens": _show(found.completion_tokens),
        "cost_dollars": {"least": format_dollars(least), "most": format_dollars(most)},
        "price_version": found.price_version,
    }


def quote_from_json(shown: Mapping[str, Any]) -> Quote:
    """Read what `quote_to_json` has written, exact to the nanodollar.

    Raises:
        ValueError: it does not have this form.
    """
    try:
        dollars = shown["cost_dollars"]
        return Quote(
            _read(shown["prompt_tokens"]),
            int(shown["image_tokens"]),
            _read(shown["completion_tokens"]),
            TokenRange(parse_dollars(dollars["least"]), parse_dollars(dollars["most"])),
            str(shown["price_version"]),
        )
    except (KeyError, TypeError) as error:
        raise ValueError("not a quote") from error


def _show(tokens: TokenRange) -> dict[str, int]:
    return {"least": tokens.least, "most": tokens.most}


def _read(shown: Mapping[str, Any]) -> TokenRange:
    return TokenRange(int(shown["least"]), int(shown["most"]))
