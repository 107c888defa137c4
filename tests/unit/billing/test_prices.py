from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.billing.prices import Price, to_dollars
from serving.settings import PriceSettings

DOLLARS_PER_MILLION = st.integers(0, 10**10).map(lambda micro: Decimal(micro).scaleb(-6))
TOKENS = st.integers(0, 10**9)


@pytest.mark.parametrize(
    ("dollars", "picodollars"),
    [("0.03", 30_000), ("0.10", 100_000), ("0", 0), ("0.000001", 1), ("1E-6", 1), ("10000", 10**10), ("1e3", 10**9)],
)
def test_a_price_per_million_is_whole_picodollars_per_token(dollars: str, picodollars: int) -> None:
    price = Price.from_settings(PriceSettings(input_per_million=Decimal(dollars), output_per_million=Decimal(0)))
    assert price == Price(input_picodollars=picodollars, output_picodollars=0)
    price = Price.from_settings(PriceSettings(input_per_million=Decimal(0), output_per_million=Decimal(dollars)))
    assert price == Price(input_picodollars=0, output_picodollars=picodollars)


@pytest.mark.parametrize(
    ("num_prompt_tokens", "num_completion_tokens", "nanodollars"),
    [(0, 0, 0), (1, 0, 30), (0, 1, 100), (1000, 500, 80_000), (10**6, 0, 30_000_000), (0, 10**6, 100_000_000)],
)
def test_the_default_price_is_the_hosted_one(
    num_prompt_tokens: int, num_completion_tokens: int, nanodollars: int
) -> None:
    price = Price.from_settings(PriceSettings())
    cost = price.cost_nanodollars(num_prompt_tokens=num_prompt_tokens, num_completion_tokens=num_completion_tokens)
    assert cost == nanodollars


@pytest.mark.parametrize(("picodollars", "nanodollars"), [(499, 0), (500, 1), (501, 1), (1499, 1), (1500, 2)])
def test_half_a_nanodollar_is_rounded_up_once_per_request(picodollars: int, nanodollars: int) -> None:
    price = Price(input_picodollars=1, output_picodollars=1)
    assert price.cost_nanodollars(num_prompt_tokens=picodollars, num_completion_tokens=0) == nanodollars
    # Rounding each side by itself would lose or gain here.
    assert price.cost_nanodollars(num_prompt_tokens=1, num_completion_tokens=picodollars - 1) == nanodollars


@given(DOLLARS_PER_MILLION, DOLLARS_PER_MILLION, TOKENS, TOKENS)
def test_a_cost_is_the_exact_one_rounded(
    input_per_million: Decimal, output_per_million: Decimal, num_prompt_tokens: int, num_completion_tokens: int
) -> None:
    settings = PriceSettings(input_per_million=input_per_million, output_per_million=output_per_million)
    dollars = (
        Fraction(input_per_million) * num_prompt_tokens + Fraction(output_per_million) * num_completion_tokens
    ) / 10**6
    cost = Price.from_settings(settings).cost_nanodollars(
        num_prompt_tokens=num_prompt_tokens, num_completion_tokens=num_completion_tokens
    )
    assert cost == math.floor(dollars * 10**9 + Fraction(1, 2))


@given(st.integers(0, 10**18))
def test_the_dollars_shown_are_the_closest_float(nanodollars: int) -> None:
    shown = to_dollars(nanodollars)
    exact = Fraction(nanodollars, 10**9)
    error = abs(Fraction(shown) - exact)
    assert error <= abs(Fraction(math.nextafter(shown, math.inf)) - exact)
    assert error <= abs(Fraction(math.nextafter(shown, -math.inf)) - exact)
