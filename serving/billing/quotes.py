"""What a request would cost, before it is run. Pure; the result brackets what it will be billed."""

from __future__ import annotations

from dataclasses import dataclass

from serving.billing.prices import Price


@dataclass(frozen=True, slots=True)
class TokenRange:
    """From `least` to `most`, both possible."""

    least: int
    most: int

    def __post_init__(self) -> None:
        if not 0 <= self.least <= self.most:
            raise ValueError(f"no range: {self.least} to {self.most}")


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

    `prompt_tokens` holds image tokens too; it is a range where the router has no tokenizer. `max_tokens` bounds each of
    the `num_choices` answers, which may also be empty. `can_be_cached` says that the model's replicas keep a prefix
    cache: then all of the prompt may come from it.
    """
    completion = TokenRange(0, max_tokens * num_choices)

    def cost(num_prompt: int, num_completion: int, num_cached: int) -> int:
        return price.cost_nanodollars(
            num_prompt_tokens=num_prompt,
            num_completion_tokens=num_completion,
            num_image_tokens=num_image_tokens,
            num_cached_tokens=num_cached,
        )

    # A cache may be dearer than none: whichever is which, both ends are covered.
    caches = (0, prompt_tokens.most) if can_be_cached else (0,)
    least = min(cost(prompt_tokens.least, completion.least, cached) for cached in caches)
    most = max(cost(prompt_tokens.most, completion.most, cached) for cached in caches)
    return Quote(prompt_tokens, num_image_tokens, completion, TokenRange(least, most), price.version)
