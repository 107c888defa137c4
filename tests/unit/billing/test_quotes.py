from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.billing.prices import Price
from serving.billing.quotes import TokenRange, quote
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
    with pytest.raises(ValueError, match="no range"):
        TokenRange(least, most)
