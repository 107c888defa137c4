"""The price of a request, in whole nanodollars. Pure.

A token's price is a whole number of picodollars, since prices per million tokens have at most six decimals. What a
request's tokens cost is added up exactly and rounded to nanodollars once, half a nanodollar up. That number is the one
in the answer's `usage`, in the ledger, in budgets and in reports; sums are sums of it, and never rounded again.
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
_DOLLARS = re.compile(r"[0-9]{1,15}\.[0-9]{9}")
"""In the place of a date in the version of the rates that no date begins."""


@dataclass(frozen=True, slots=True)
class Price:
    """Picodollars per token: $0.03 per million tokens is 30,000 picodollars a token, exactly."""

    input_picodollars: int
    output_picodollars: int
    cached_picodollars: int | None = None
    """None: cached tokens cost what others of their kind do."""
    image_picodollars: int | None = None
    """None: image tokens cost what text does."""
    version: str = field(default="", compare=False)
    """Where the rates come from and a digest of them, so that the same words never stand for two prices."""

    @classmethod
    def from_settings(cls, rates: RateSettings, origin: str = _BASE) -> Price:
        """Dollars per million tokens are microdollars per token, which are 10^6 picodollars each."""
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
        """The cost of a request; half a nanodollar is rounded up, once per request.

        Cached and image tokens are parts of the prompt that may overlap, and counts don't say how far. The dearer kind
        is taken to be the cached one, so that nobody pays more than an exact count would have made it.
        """
        picodollars = self._cost_picodollars(
            num_prompt_tokens, num_completion_tokens, num_image_tokens, num_cached_tokens
        )
        return _round(picodollars)

    def most_nanodollars(
        self, *, num_prompt_tokens: int, num_completion_tokens: int, num_image_tokens: int | None
    ) -> int:
        """The most that a request of at most so many tokens can cost, whatever part of its prompt comes from a cache.

        `num_image_tokens` is None when any part of the prompt may be images. Engines that do not tell image tokens
        apart are covered too.
        """
        prompt = self._most_of_prompt(num_prompt_tokens, num_image_tokens)
        return _round(prompt + num_completion_tokens * self.output_picodollars)

    def count_payable(self, nanodollars: int, *, num_prompt_tokens: int, num_image_tokens: int | None) -> int | None:
        """Completion tokens that an amount pays for beside the prompt, in the sense of `most_nanodollars`.

        None: any number, since they cost nothing. Negative: not even the prompt.
        """
        left = nanodollars * _PICO_PER_NANO + _PICO_PER_NANO // 2 - 1  # what is still rounded down to the amount
        left -= self._most_of_prompt(num_prompt_tokens, num_image_tokens)
        if self.output_picodollars == 0:
            return None if left >= 0 else -1
        return left // self.output_picodollars

    def _most_of_prompt(self, num_tokens: int, num_image_tokens: int | None) -> int:
        # The cost is convex in either count, so the largest is at an end.
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
        """What a request is charged: nothing when it was refused or the stack failed it, else all its tokens."""
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
    """Prices in the order of their dates; the first has been in force for ever."""

    starts_ns: tuple[int, ...]
    prices: tuple[Price, ...]

    @classmethod
    def from_settings(cls, settings: PriceListSettings, owner: str = "") -> PriceList:
        """`owner` goes before the versions: the tenant whose list it is."""
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
        """The price in force at a moment."""
        return self.prices[max(0, bisect_right(self.starts_ns, time_ns) - 1)]


@dataclass(frozen=True, slots=True)
class PriceRow:
    """One price with what it holds for: kept beside the ledger, so that every cost in it can be computed again."""

    model: str
    tenant_id: str
    """Empty: for all who have no list of their own."""
    since_ns: int
    price: Price


@dataclass(frozen=True, slots=True)
class PriceBook:
    """The price lists of all models and tenants."""

    lists: Mapping[tuple[str, str], PriceList]
    """By model and tenant; the empty tenant is everybody else."""

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
        """What a tenant pays for a model at a moment: that of the request's arrival.

        Raises:
            KeyError: there is no such model.
        """
        own = self.lists.get((model, tenant_id))
        return (own or self.lists[model, ""]).at(time_ns)

    def rows(self) -> Iterator[PriceRow]:
        """Every price there is."""
        for (model, tenant_id), price_list in self.lists.items():
            for since_ns, price in zip(price_list.starts_ns, price_list.prices, strict=True):
                yield PriceRow(model, tenant_id, since_ns, price)


def _round(picodollars: int) -> int:
    return (picodollars + _PICO_PER_NANO // 2) // _PICO_PER_NANO


def to_dollars(nanodollars: int) -> float:
    """For showing: the closest float to an exact number of nanodollars."""
    return nanodollars / NANO_PER_DOLLAR


def format_dollars(nanodollars: int) -> str:
    """Every digit of it, `12.000000345`."""
    whole, part = divmod(abs(nanodollars), NANO_PER_DOLLAR)
    return f"{'-' if nanodollars < 0 else ''}{whole}.{part:09d}"


def parse_dollars(text: str) -> int:
    """The nanodollars that `format_dollars` has written, none lost.

    Raises:
        ValueError: it has not.
    """
    if _DOLLARS.fullmatch(text) is None:
        raise ValueError("not an amount of dollars")
    return int(text.replace(".", ""))
