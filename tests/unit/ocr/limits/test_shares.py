"""Shares of what there is only so much of: for any tenants and amounts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.errors import OverloadedError, RateLimitError
from serving.ocr.limits.shares import Holding, Refusals, Shares

WORDS = Refusals("own", "Yours.", "full", "All.", 2.0)


@dataclass(frozen=True)
class Holder:
    owner: str
    is_one_of_many: bool = True


A, B, C = Holder("a"), Holder("b"), Holder("c")


def fill(shares: Shares, holder: Holder) -> int:
    """Take one by one as many as can be had; says how many."""
    for number in range(1000):
        try:
            shares.check(holder)
        except (RateLimitError, OverloadedError):
            return number
        shares.add(holder.owner, 1)
    raise AssertionError("no end")


def take(holding: Holding, amount: int) -> str:
    """Whether it is held, or what it is refused with."""
    try:
        holding.take(amount)
    except (RateLimitError, OverloadedError) as error:
        return str(error.code)
    return "held"


@given(total=st.integers(1, 64), share=st.floats(0.1, 0.9))
def test_who_takes_all_it_can_get_leaves_something_to_others(total: int, share: float) -> None:
    shares = Shares(total, share, WORDS)
    first = fill(shares, A)
    assert 1 <= first <= max(1, share * total)
    if total > 1:
        assert fill(shares, B) >= 1
    assert shares.num_held <= total


@given(total=st.integers(1, 64))
def test_a_single_user_without_keys_may_have_the_whole(total: int) -> None:
    assert fill(Shares(total, 0.5, WORDS), Holder("anonymous", is_one_of_many=False)) == total


@given(st.lists(st.tuples(st.sampled_from([A, B, C]), st.integers(1, 5)), max_size=60))
def test_nobody_holds_more_than_there_is_and_all_of_it_comes_back(ops: list[tuple[Holder, int]]) -> None:
    shares, mine = Shares(10, 0.5, WORDS, least=2), Counter[str]()
    holdings = [shares.hold(holder) for holder, _ in ops]
    for holding, (holder, amount) in zip(holdings, ops, strict=True):
        others = sum(mine.values()) - mine[holder.owner]
        is_over, is_full = mine[holder.owner] + amount > max(2, 0.5 * (10 - others)), sum(mine.values()) + amount > 10
        assert take(holding, amount) == ("own" if is_over else "full" if is_full else "held")
        if not is_over and not is_full:
            mine[holder.owner] += amount
        assert shares.num_held == sum(mine.values()) <= 10
    for holding in holdings:
        with holding:
            pass
    assert shares.num_held == 0


def test_what_is_given_back_can_be_had_by_others() -> None:
    shares = Shares(2, 0.5, WORDS)
    with shares.hold(A) as held:
        held.take(1)
        with pytest.raises(RateLimitError):
            shares.check(A)
        shares.add("b", 1)
        with pytest.raises(OverloadedError):
            shares.check(C)
    shares.check(C)
