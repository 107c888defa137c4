"""The price of a request, in whole nanodollars. Pure.

A token's price is a whole number of picodollars, since prices per million tokens have at most six decimals. The cost of
a request's tokens is added up exactly and rounded once to nanodollars, half up. The same number appears in the answer's
`usage`, the ledger, budgets and reports; sums add it up and are never rounded again.
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from serving.billing.periods import start_of_day_ns
from serving.billing.records import Outcome, TokenCounts
from serving.settings.billing import PriceListSettings, PriceSettings, RateSettings

NANO_PER_DOLLAR = 10**9
_PICO_PER_NANO = 1000
_FREE = (Outcome.REFUSED, Outcome.FAILED)
_BASE = "base"
"""Takes the place of the date in the version of the rates that have no date."""
_DOLLARS = re.compile(r"[0-9]{1,15}\.[0-9]{9}")
"""What `format_dollars` writes."""


@dataclass(frozen=True, slots=True)
class Price:
    """Picodollars per token: $0.03 per million tokens is 30,000 picodollars a token, exactly."""

    input_picodollars: int
    output_picodollars: int
    cached_picodollars: int | None = None
    """None: cached tokens have no price of their own."""
    image_picodollars: int | None = None
    """None: image tokens cost as much as text."""
    version: str = field(default="", compare=False)
    """The origin of the rates and a digest of them, so that one version never means two prices."""

    @classmethod
    def from_settings(cls, rates: RateSettings, origin: str = _BASE) -> Price:
        """Convert rates: dollars per million tokens are microdollars per token, of 10^6 picodollars each."""
        cached, image = rates.cached_input_per_million, rates.image_per_million
        amounts = (
            int(rates.input_per_million.scaleb(6)),
            int(rates.output_per_million.scaleb(6)),
            None if cached is None else int(cached.scaleb(6)),
            None if image is None else int(image.scaleb(6)),
        )
        digest = hashlib.sha256(repr(amounts).encode()).hexdigest()[:8]
        return cls(*amounts, version=f"{origin}-{digest}")

    def cost_nanodollars(
        self,
        *,
        num_prompt_tokens: int,
        num_completion_tokens: int,
        num_image_tokens: int = 0,
        num_cached_tokens: int = 0,
    ) -> int:
        """The cost of a request, rounded once; half a nanodollar is rounded up.

        Cached and image tokens are parts of the prompt that may overlap, and the counts do not say how far. The more
        expensive kind is assumed to be cached, so that no tenant pays more than an exact count would have cost.
        """
        picodollars = self._cost_picodollars(
            num_prompt_tokens, num_completion_tokens, num_image_tokens, num_cached_tokens
        )
        return _round(picodollars)

    def most_nanodollars(
        self, *, num_prompt_tokens: int, num_completion_tokens: int, num_image_tokens: int | None
    ) -> int:
        """The most that a request with at most these tokens can cost, whatever part of its prompt is cached.

        `num_image_tokens` is None if any part of the prompt may be images. Engines that do not report image tokens
        separately are covered, too.
        """
        prompt = self._most_of_prompt(num_prompt_tokens, num_image_tokens)
        return _round(prompt + num_completion_tokens * self.output_picodollars)

    def count_payable(self, nanodollars: int, *, num_prompt_tokens: int, num_image_tokens: int | None) -> int | None:
        """How many completion tokens an amount pays for besides the prompt, by the bound of `most_nanodollars`.

        None: any number, since they are free. Negative: not even the prompt.
        """
        left = nanodollars * _PICO_PER_NANO + _PICO_PER_NANO // 2 - 1  # the most that is rounded down to the amount
        left -= self._most_of_prompt(num_prompt_tokens, num_image_tokens)
        if self.output_picodollars == 0:
            return None if left >= 0 else -1
        return left // self.output_picodollars

    def _most_of_prompt(self, num_tokens: int, num_image_tokens: int | None) -> int:
        # The cost is convex in both counts, so its maximum is at an end.
        images = (0, num_tokens if num_image_tokens is None else min(num_image_tokens, num_tokens))
        return max(
            self._cost_picodollars(num_tokens, 0, image, cached) for image in images for cached in (0, num_tokens)
        )

    def _cost_picodollars(
        self, num_prompt_tokens: int, num_completion_tokens: int, num_image_tokens: int, num_cached_tokens: int
    ) -> int:
        image_rate = self.input_picodollars if self.image_picodollars is None else self.image_picodollars
        num_cached = 0 if self.cached_picodollars is None else min(num_cached_tokens, num_prompt_tokens)
        num_image = min(num_image_tokens, num_prompt_tokens)
        if image_rate >= self.input_picodollars:
            num_image = max(0, num_image - num_cached)
        else:
            num_image = min(num_image, num_prompt_tokens - num_cached)
        return (
            num_cached * (self.cached_picodollars or 0)
            + num_image * image_rate
            + (num_prompt_tokens - num_cached - num_image) * self.input_picodollars
            + num_completion_tokens * self.output_picodollars
        )

    def bill_nanodollars(self, tokens: TokenCounts, outcome: Outcome) -> int:
        """What a request is charged: nothing if it was refused or failed by the stack, otherwise all its tokens."""
        if outcome in _FREE:
            return 0
        return self.cost_nanodollars(
            num_prompt_tokens=tokens.num_prompt_tokens,
            num_completion_tokens=tokens.num_completion_tokens,
            num_image_tokens=tokens.num_image_tokens,
            num_cached_tokens=tokens.num_cached_tokens,
        )


@dataclass(frozen=True, slots=True)
class PriceList:
    """Prices in order of date; the first one applies from the beginning of time."""

    starts_ns: tuple[int, ...]
    prices: tuple[Price, ...]

    @classmethod
    def from_settings(cls, settings: PriceListSettings, owner: str = "") -> PriceList:
        """`owner` is the tenant whose list it is; versions are prefixed with it."""
        prefix = f"{owner}/" if owner else ""
        dated = [(start_of_day_ns(rates.since), rates.since.isoformat(), rates) for rates in settings.changes]
        return cls(
            starts_ns=(0, *(start for start, _, _ in dated)),
            prices=(
                Price.from_settings(settings, prefix + _BASE),
                *(Price.from_settings(rates, prefix + since) for _, since, rates in dated),
            ),
        )

    def at(self, time_ns: int) -> Price:
        """The price in force at a time."""
        return self.prices[max(0, bisect_right(self.starts_ns, time_ns) - 1)]


@dataclass(frozen=True, slots=True)
class PriceRow:
    """One price and what it applies to: stored beside the ledger, so that every cost in it can be recomputed."""

    model: str
    tenant_id: str
    """Empty: for all tenants without a list of their own."""
    since_ns: int
    price: Price


@dataclass(frozen=True, slots=True)
class PriceBook:
    """The price lists of all models and tenants."""

    lists: Mapping[tuple[str, str], PriceList]
    """By model and tenant; the empty tenant stands for all others."""

    @classmethod
    def from_settings(cls, models: Mapping[str, PriceSettings]) -> PriceBook:
        """By canonical name of the model."""
        lists: dict[tuple[str, str], PriceList] = {}
        for model, settings in models.items():
            lists[model, ""] = PriceList.from_settings(settings)
            for tenant_id, own in settings.tenants.items():
                lists[model, tenant_id] = PriceList.from_settings(own, tenant_id)
        return cls(lists)

    def find(self, model: str, tenant_id: str, time_ns: int) -> Price:
        """What a tenant pays for a model at the time of a request's arrival.

        Raises:
            KeyError: there is no such model.
        """
        own = self.lists.get((model, tenant_id))
        return (own or self.lists[model, ""]).at(time_ns)

    def rows(self) -> Iterator[PriceRow]:
        """All prices."""
        for (model, tenant_id), price_list in self.lists.items():
            for since_ns, price in zip(price_list.starts_ns, price_list.prices, strict=True):
                yield PriceRow(model, tenant_id, since_ns, price)


def _round(picodollars: int) -> int:
    return (picodollars + _PICO_PER_NANO // 2) // _PICO_PER_NANO


def to_dollars(nanodollars: int) -> float:
    """For display only: the closest float to an exact number of nanodollars."""
    return nanodollars / NANO_PER_DOLLAR


def format_dollars(nanodollars: int) -> str:
    """All digits, as `12.000000345`."""
    whole, part = divmod(abs(nanodollars), NANO_PER_DOLLAR)
    return f"{'-' if nanodollars < 0 else ''}{whole}.{part:09d}"


def parse_dollars(text: str) -> int:
    """The exact nanodollars of what `format_dollars` has written.

    Raises:
        ValueError: the text does not have its format.
    """
    if _DOLLARS.fullmatch(text) is None:
        raise ValueError("not an amount of dollars")
    return int(text.replace(".", ""))
