from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.billing.prices import Price
from serving.billing.quotes import Quote, TokenRange, quote, quote_from_json, quote_to_json, sum_quotes
from serving.billing.records import Outcome, TokenCounts

RATES = st.integers(0, 10**6)
COUNTS = st.integers(0, 5000)


def test_a_quote_is_exact_to_the_nanodollar() -> None:
    price = Price(30_000, 100_000, version="v")
    found = quote(price, prompt_tokens=TokenRange(1000, 1010), num_image_tokens=900, max_tokens=500, num_choices=2)
    assert found.nanodollars == TokenRange(30_000, 30_300 + 100_000)
    assert (found.completion_tokens, found.price_version) == (TokenRange(0, 1000), "v")


@given(
    price=st.builds(Price, RATES, RATES, st.none() | RATES, st.none() | RATES),
    ends=st.tuples(COUNTS, COUNTS).map(sorted),
    prompt=COUNTS,
    image=COUNTS,
    completion=COUNTS,
    cached=COUNTS,
    max_tokens=COUNTS,
    can_be_cached=st.booleans(),
)
def test_a_request_costs_what_its_quote_said(
    price: Price,
    ends: list[int],
    prompt: int,
    image: int,
    completion: int,
    cached: int,
    max_tokens: int,
    can_be_cached: bool,
) -> None:
    prompt = min(max(prompt, ends[0]), ends[1])
    image = min(image, ends[0])
    found = quote(
        price,
        prompt_tokens=TokenRange(*ends),
        num_image_tokens=image,
        max_tokens=max_tokens,
        can_be_cached=can_be_cached,
    )
    tokens = TokenCounts(prompt, image, min(cached, prompt) if can_be_cached else 0, min(completion, max_tokens))
    assert found.nanodollars.least <= price.bill_nanodollars(tokens, Outcome.COMPLETED) <= found.nanodollars.most


@pytest.mark.parametrize(("least", "most"), [(2, 1), (-1, 0)])
def test_a_range_has_an_order(least: int, most: int) -> None:
    with pytest.raises(ValueError, match="not a range"):
        TokenRange(least, most)


def test_quotes_come_back_as_they_were_shown_and_add_up() -> None:
    found = Quote(TokenRange(1, 2), 3, TokenRange(0, 4), TokenRange(5, 12_000_000_345), "v")
    assert quote_from_json(quote_to_json("nano", found)) == found
    twice = sum_quotes([found, found])
    assert twice == Quote(TokenRange(2, 4), 6, TokenRange(0, 8), TokenRange(10, 24_000_000_690), "v")
    assert sum_quotes(()).nanodollars == TokenRange(0, 0)


@pytest.mark.parametrize("amount", ["1", "-1.000000000", "1.0000000001", "x", "1e3", 1.5, None])
def test_an_amount_that_is_none_is_refused(amount: object) -> None:
    shown = quote_to_json("nano", sum_quotes(()))
    with pytest.raises(ValueError, match="not a"):
        quote_from_json({**shown, "cost_dollars": {"least": amount, "most": "1.000000000"}})
