"""The price of a request, in whole nanodollars. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from serving.settings import PriceSettings

NANO_PER_DOLLAR = 10**9
_PICO_PER_NANO = 1000


@dataclass(frozen=True, slots=True)
class Price:
    """Picodollars per token: $0.03 per million tokens is 30,000 picodollars a token, exactly."""

    input_picodollars: int
    output_picodollars: int

    @classmethod
    def from_settings(cls, price: PriceSettings) -> Price:
        """Dollars per million tokens are microdollars per token, which are 10^6 picodollars each."""
        return cls(
            input_picodollars=int(price.input_per_million.scaleb(6)),
            output_picodollars=int(price.output_per_million.scaleb(6)),
        )

    def cost_nanodollars(self, *, num_prompt_tokens: int, num_completion_tokens: int) -> int:
        """The cost of a request; half a nanodollar is rounded up, once per request."""
        picodollars = num_prompt_tokens * self.input_picodollars + num_completion_tokens * self.output_picodollars
        return (picodollars + _PICO_PER_NANO // 2) // _PICO_PER_NANO


def to_dollars(nanodollars: int) -> float:
    """For showing: the closest float to an exact number of nanodollars."""
    return nanodollars / NANO_PER_DOLLAR
