from __future__ import annotations

import math
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from serving.billing.periods import parse_time_ns
from serving.billing.prices import Price, PriceBook, format_dollars, to_dollars
from serving.billing.records import Outcome, TokenCounts
from serving.settings.stack import PriceSettings

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


RATES = st.integers(0, 10**6)
PRICES = st.builds(Price, RATES, RATES, st.none() | RATES, st.none() | RATES)
COUNTS = st.integers(0, 10**6)
TOKEN_COUNTS = st.builds(TokenCounts, COUNTS, COUNTS, COUNTS, COUNTS)
DAY_NS = 86_400 * 10**9


def cost(price: Price, tokens: TokenCounts) -> int:
    return price.bill_nanodollars(tokens, Outcome.COMPLETED)


@given(PRICES, TOKEN_COUNTS)
def test_a_cost_is_never_negative_and_never_more_than_the_dearest_rate(price: Price, tokens: TokenCounts) -> None:
    given_rates = (price.input_picodollars, price.cached_picodollars, price.image_picodollars)
    rates = [rate for rate in given_rates if rate is not None]
    most = tokens.num_prompt_tokens * max(rates) + tokens.num_completion_tokens * price.output_picodollars
    least = tokens.num_prompt_tokens * min(rates) + tokens.num_completion_tokens * price.output_picodollars
    assert least // 1000 <= cost(price, tokens) <= most // 1000 + 1


@given(PRICES, TOKEN_COUNTS, st.integers(0, 1000), st.integers(0, 1000))
def test_more_tokens_never_cost_less(price: Price, tokens: TokenCounts, more_prompt: int, more_completion: int) -> None:
    more = replace(
        tokens,
        num_prompt_tokens=tokens.num_prompt_tokens + more_prompt,
        num_completion_tokens=tokens.num_completion_tokens + more_completion,
    )
    # More prompt may also make room for image tokens that the count said were there.
    if tokens.num_image_tokens <= tokens.num_prompt_tokens and tokens.num_cached_tokens <= tokens.num_prompt_tokens:
        assert cost(price, more) >= cost(price, tokens)


@given(PRICES, TOKEN_COUNTS)
def test_the_price_of_cached_and_image_tokens_favours_the_tenant(price: Price, tokens: TokenCounts) -> None:
    """The cost is the least of all ways in which cached and image tokens may overlap."""
    prompt = tokens.num_prompt_tokens
    image = min(tokens.num_image_tokens, prompt)
    cached = 0 if price.cached_picodollars is None else min(tokens.num_cached_tokens, prompt)
    image_rate = price.input_picodollars if price.image_picodollars is None else price.image_picodollars
    ends = {max(0, image - cached), min(image, prompt - cached)}  # image tokens that are not cached: least and most
    ways = [
        cached * (price.cached_picodollars or 0)
        + fresh * image_rate
        + (prompt - cached - fresh) * price.input_picodollars
        + tokens.num_completion_tokens * price.output_picodollars
        for fresh in ends
    ]
    assert cost(price, tokens) == (min(ways) + 500) // 1000


@pytest.mark.parametrize("outcome", list(Outcome))
def test_who_was_refused_or_failed_pays_nothing(outcome: Outcome) -> None:
    price = Price.from_settings(PriceSettings())
    billed = price.bill_nanodollars(TokenCounts(1000, 0, 0, 500), outcome)
    assert billed == (0 if outcome in (Outcome.REFUSED, Outcome.FAILED) else 80_000)


LISTED = PriceSettings.model_validate(
    {
        "changes": [
            {"since": "2026-12-01", "input_per_million": "0.04", "output_per_million": "0.20"},
            {"since": "2027-01-01", "input_per_million": "0.05", "output_per_million": "0.20"},
        ],
        "tenants": {"acme": {"input_per_million": "0.01", "output_per_million": "0.02"}},
    }
)
BOOK = PriceBook.from_settings({"nano": LISTED, "large": PriceSettings()})


@pytest.mark.parametrize(
    ("moment", "tenant_id", "picodollars", "version"),
    [
        ("1970-01-01", "beta", 30_000, "base-"),
        ("2026-11-30T23:59:59.999999", "beta", 30_000, "base-"),
        ("2026-12-01", "beta", 40_000, "2026-12-01-"),
        ("2026-12-31T23:59:59", "", 40_000, "2026-12-01-"),
        ("2031-01-01", "beta", 50_000, "2027-01-01-"),
        ("2031-01-01", "acme", 10_000, "acme/base-"),
    ],
)
def test_a_price_holds_from_its_day_on(moment: str, tenant_id: str, picodollars: int, version: str) -> None:
    price = BOOK.find("nano", tenant_id, parse_time_ns(moment))
    assert price.input_picodollars == picodollars
    assert price.version.startswith(version)


def test_a_version_stands_for_one_set_of_rates() -> None:
    rows = list(BOOK.rows())
    assert [(row.model, row.tenant_id, row.since_ns // DAY_NS) for row in rows] == [
        ("nano", "", 0),
        ("nano", "", 20_788),
        ("nano", "", 20_819),
        ("nano", "acme", 0),
        ("large", "", 0),
    ]
    versions = {row.price.version: row.price for row in rows}
    assert len(versions) == 4  # nano and large begin with the same rates
    again = PriceBook.from_settings({"nano": LISTED})
    assert again.find("nano", "acme", 0).version == BOOK.find("nano", "acme", 0).version
    assert Price.from_settings(PriceSettings(input_per_million=Decimal(1))).version not in versions


def test_a_model_that_does_not_exist_has_no_price() -> None:
    with pytest.raises(KeyError):
        BOOK.find("other", "", 0)


@pytest.mark.parametrize(
    ("price", "reason"),
    [
        ({"changes": [{"since": "2026-12-01"}]}, "Field required"),
        ({"tenants": {"acme": {"input_per_million": "1"}}}, "Field required"),
        ({"cached_input_per_million": True}, "must be a number"),
        ({"image_per_million": "-1"}, "greater than or equal to 0"),
        (
            {
                "changes": [
                    {"since": "2026-12-01", "input_per_million": 1, "output_per_million": 1},
                    {"since": "2026-12-01", "input_per_million": 1, "output_per_million": 1},
                ]
            },
            "in the order of their dates",
        ),
    ],
)
def test_a_price_list_that_cannot_be_meant_is_refused(price: dict[str, object], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        PriceSettings.model_validate(price)


def test_a_price_list_is_dumped_as_it_was_given() -> None:
    assert PriceSettings.model_validate(LISTED.model_dump(mode="json")) == LISTED
    assert PriceSettings().model_dump(mode="json") == {"input_per_million": "0.03", "output_per_million": "0.10"}


@given(st.integers(-(10**18), 10**18))
def test_dollars_are_written_with_every_digit(nanodollars: int) -> None:
    assert Decimal(format_dollars(nanodollars)) == Decimal(nanodollars).scaleb(-9)


@given(PRICES, TOKEN_COUNTS, st.integers(0, 1000), st.integers(0, 1000), st.booleans())
def test_no_request_within_its_bounds_costs_more_than_the_most(
    price: Price, tokens: TokenCounts, more_prompt: int, more_completion: int, knows_images: bool
) -> None:
    most = price.most_nanodollars(
        num_prompt_tokens=tokens.num_prompt_tokens + more_prompt,
        num_completion_tokens=tokens.num_completion_tokens + more_completion,
        num_image_tokens=tokens.num_image_tokens if knows_images else None,
    )
    assert price.bill_nanodollars(tokens, Outcome.COMPLETED) <= most
    assert price.bill_nanodollars(replace(tokens, num_image_tokens=0), Outcome.COMPLETED) <= most


@given(PRICES, st.integers(0, 10**12), st.integers(0, 10**6), st.none() | st.integers(0, 10**6))
def test_an_amount_pays_for_so_many_tokens_and_no_more(
    price: Price, nanodollars: int, num_prompt: int, num_image: int | None
) -> None:
    payable = price.count_payable(nanodollars, num_prompt_tokens=num_prompt, num_image_tokens=num_image)

    def most(num_completion: int) -> int:
        return price.most_nanodollars(
            num_prompt_tokens=num_prompt, num_completion_tokens=num_completion, num_image_tokens=num_image
        )

    if payable is None:
        assert most(10**9) <= nanodollars
    elif payable < 0:
        assert most(0) > nanodollars
    else:
        assert most(payable) <= nanodollars < most(payable + 1)
