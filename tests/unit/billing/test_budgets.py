from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from serving.billing.budgets import Budgets, BudgetState, Reservation
from serving.billing.periods import parse_time_ns
from serving.errors import QuotaExceededError, RateLimitError

LIMIT = 1000
NOW_NS = parse_time_ns("2026-11-30T23:59:59")
DECEMBER_NS = parse_time_ns("2026-12-01")


def reserve(budgets: Budgets, amount: int, *, limit: int | None = LIMIT, now_ns: int = NOW_NS) -> Reservation:
    return budgets.reserve("acme", limit_nanodollars=limit, most_nanodollars=amount, now_ns=now_ns)


def spend(budgets: Budgets, amount: int, *, now_ns: int = NOW_NS) -> None:
    budgets.settle(reserve(budgets, 0, limit=None, now_ns=now_ns), amount)


@pytest.mark.parametrize(
    ("spent", "state", "percent"),
    [(0, "ok", 0), (799, "ok", 79), (800, "warning", 80), (999, "warning", 99), (1000, "exhausted", 100)],
)
def test_a_budget_warns_before_it_ends(spent: int, state: str, percent: int) -> None:
    budgets = Budgets()
    spend(budgets, spent)
    status = budgets.status("acme", limit_nanodollars=LIMIT, now_ns=NOW_NS)
    assert (status.state, status.used_percent, status.month) == (state, percent, "2026-11")
    assert budgets.status("acme", limit_nanodollars=None, now_ns=NOW_NS).state is BudgetState.OK
    assert budgets.status("beta", limit_nanodollars=LIMIT, now_ns=NOW_NS).spent_nanodollars == 0


def test_who_has_spent_it_all_is_refused_until_the_next_month() -> None:
    budgets = Budgets()
    spend(budgets, LIMIT)
    with pytest.raises(QuotaExceededError, match=r"\$0\.000001 for 2026-11") as caught:
        reserve(budgets, 1)
    assert (caught.value.http_status, caught.value.code) == (429, "insufficient_quota")
    reserve(budgets, 1, now_ns=DECEMBER_NS)
    reserve(budgets, 1, limit=None)


def test_nothing_may_be_spent_of_nothing() -> None:
    budgets = Budgets()
    assert budgets.status("acme", limit_nanodollars=0, now_ns=NOW_NS).used_percent == 100
    with pytest.raises(QuotaExceededError):
        reserve(budgets, 0, limit=0)


def test_what_runs_counts_to_the_month_in_which_it_came() -> None:
    budgets = Budgets()
    reservation = reserve(budgets, 600)
    budgets.forget_before("2026-12")
    budgets.settle(reservation, 700)
    budgets.settle(reservation, 700)
    assert budgets.status("acme", limit_nanodollars=LIMIT, now_ns=NOW_NS).spent_nanodollars == 700
    assert budgets.status("acme", limit_nanodollars=LIMIT, now_ns=DECEMBER_NS).spent_nanodollars == 0
    budgets.forget_before("2026-12")
    assert budgets.status("acme", limit_nanodollars=LIMIT, now_ns=NOW_NS).spent_nanodollars == 0


def test_others_spending_comes_later_and_never_goes_back() -> None:
    budgets = Budgets()
    spend(budgets, 100)
    budgets.refresh("2026-11", {"acme": 500})
    budgets.refresh("2026-11", {"acme": 400})
    budgets.refresh("2026-10", {"acme": 9999})
    assert budgets.status("acme", limit_nanodollars=LIMIT, now_ns=NOW_NS).spent_nanodollars == 600


def test_what_the_rest_does_not_pay_for_is_refused_for_good() -> None:
    budgets = Budgets()
    spend(budgets, 700)
    with pytest.raises(QuotaExceededError, match=r"can cost \$0\.000000301.* smaller max_tokens") as caught:
        budgets.reserve("acme", limit_nanodollars=LIMIT, most_nanodollars=301, now_ns=NOW_NS, param="max_tokens")
    assert caught.value.param == "max_tokens"
    reserve(budgets, 300)


def test_what_others_may_not_need_is_refused_for_the_moment() -> None:
    budgets = Budgets()
    first = reserve(budgets, 600)
    with pytest.raises(RateLimitError, match="Running requests") as caught:
        reserve(budgets, 600)
    assert int(caught.value.headers["retry-after"]) >= 1
    budgets.settle(first, 100)
    reserve(budgets, 600)


class Spending(RuleBasedStateMachine):
    """Two routers and a database that they hear of each other by, now and then."""

    running = Bundle("running")

    def __init__(self) -> None:
        super().__init__()
        self.routers = (Budgets(), Budgets())
        self.settled = [0, 0]
        self.known = [0, 0]
        """What each has been told of the other."""
        self.admitted: dict[int, list[int]] = {0: [], 1: []}
        self.unknown = 0
        """The most that the other had spent or in flight, untold, when one let a request in."""

    @rule(target=running, router=st.integers(0, 1), amount=st.integers(1, 300))
    def admit(self, router: int, amount: int) -> object:
        left = LIMIT - self.settled[router] - self.known[router]
        try:
            reservation = reserve(self.routers[router], amount)
        except QuotaExceededError:
            assert amount > left
            return (router, None, 0)
        except RateLimitError:
            assert left - sum(self.admitted[router]) < amount <= left
            return (router, None, 0)
        assert amount <= left - sum(self.admitted[router])
        self.admitted[router].append(amount)
        untold = self.settled[1 - router] - self.known[router] + sum(self.admitted[1 - router])
        self.unknown = max(self.unknown, untold)
        return (router, reservation, amount)

    @rule(request=consumes(running), part=st.integers(0, 100))
    def end(self, request: tuple[int, Reservation | None, int], part: int) -> None:
        router, reservation, amount = request
        if reservation is None:
            return
        cost = amount * part // 100
        self.routers[router].settle(reservation, cost)
        self.admitted[router].remove(amount)
        self.settled[router] += cost

    @rule(router=st.integers(0, 1))
    def refresh(self, router: int) -> None:
        self.known[router] = self.settled[1 - router]
        self.routers[router].refresh("2026-11", {"acme": self.known[router]})

    @invariant()
    def a_router_never_spends_more_than_the_budget(self) -> None:
        for router in (0, 1):
            assert self.settled[router] + sum(self.admitted[router]) <= LIMIT

    @invariant()
    def all_overshoot_by_what_a_router_did_not_know_of_the_others(self) -> None:
        assert sum(self.settled) + sum(map(sum, self.admitted.values())) <= LIMIT + self.unknown


TestSpending = Spending.TestCase


@given(st.lists(st.tuples(st.integers(0, 500), st.integers(0, 500)), max_size=40))
def test_what_is_reserved_is_given_back_whole(amounts: list[tuple[int, int]]) -> None:
    budgets = Budgets()
    held = [(reserve(budgets, estimate, limit=None), cost) for estimate, cost in amounts]
    status = budgets.status("acme", limit_nanodollars=None, now_ns=NOW_NS)
    assert status.reserved_nanodollars == sum(estimate for estimate, _ in amounts)
    for reservation, cost in held:
        budgets.settle(reservation, cost)
    status = budgets.status("acme", limit_nanodollars=None, now_ns=NOW_NS)
    assert (status.reserved_nanodollars, status.spent_nanodollars) == (0, sum(cost for _, cost in amounts))
