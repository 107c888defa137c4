from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.cluster.directory import RouterReport, TenantUse
from serving.errors import RateLimitError
from serving.router.access.limits import (
    DOCUMENT,
    GENERATION,
    LOOKUP,
    POLL,
    Bucket,
    Charge,
    TenantLimits,
    format_duration,
)
from serving.settings.tenants import Identity, Tenant


def who(tenant: str = "t", **limits: Any) -> Identity:
    return Identity(tenant, Tenant(**limits))


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def build_limits() -> tuple[TenantLimits, Clock]:
    clock = Clock()
    return TenantLimits(clock), clock


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.0001, "1ms"),
        (0.12, "120ms"),
        (0.9999, "1s"),
        (1, "1s"),
        (1.1, "1.1s"),
        (7.66, "7.66s"),
        (59.9995, "1m0s"),
        (72.5, "1m12.5s"),
        (360, "6m0s"),
        (3600, "1h0m0s"),
        (7325.001, "2h2m5.001s"),
    ],
)
def test_times_are_written_as_openai_writes_them(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_a_bucket_holds_a_minute_and_fills_in_a_minute() -> None:
    bucket = Bucket(60, 0.0)
    assert [bucket.take(1, 0.0) for _ in range(60)] == [0.0] * 60
    assert bucket.take(1, 0.0) == pytest.approx(1.0)
    assert bucket.take(10, 0.0) == pytest.approx(10.0)
    assert bucket.remaining(30.0) == 30
    assert bucket.reset_s(30.0) == pytest.approx(30.0)
    assert bucket.remaining(1000.0) == 60


def test_more_than_the_limit_is_let_through_by_a_full_bucket() -> None:
    bucket = Bucket(60, 0.0)
    assert bucket.take(180, 0.0) == 0.0
    assert bucket.take(1, 0.0) == pytest.approx(121.0)
    assert bucket.take(180, 0.0) == pytest.approx(180.0)
    assert bucket.take(180, 180.0) == 0.0


@given(
    st.integers(1, 1000),
    st.lists(st.tuples(st.floats(0, 30), st.sampled_from(["take", "settle"]), st.integers(0, 300)), max_size=60),
)
def test_a_bucket_is_in_debt_for_what_is_in_flight_and_no_more(limit: int, steps: list[tuple[float, str, int]]) -> None:
    bucket, now_s, largest = Bucket(limit, 0.0), 0.0, 0
    reserved: list[int] = []
    taken = 0.0
    for wait_s, what, n in steps:
        now_s += wait_s
        if what == "take":
            needed_s = bucket.take(n, now_s)
            if needed_s == 0:
                reserved.append(n)
                largest = max(largest, n)
                taken += n
            else:
                assert bucket.take(n, now_s + needed_s * 0.99) > 0 or needed_s < 1e-6
                now_s += needed_s
        elif reserved:
            bucket.debit(-min(n, reserved.pop()), now_s)
        assert 0 <= bucket.used <= max(limit, largest) + 1e-6
    assert taken <= limit + now_s * limit / 60 + sum(n for _, what, n in steps) + largest


def test_requests_per_minute() -> None:
    limits, _ = build_limits()
    me = who(requests_per_minute=2)
    for _ in range(2):
        limits.admit(me, 0.0)
        limits.leave(me)
    with pytest.raises(RateLimitError) as refused:
        limits.admit(me, 0.0)
    assert refused.value.retry_after_s == pytest.approx(30.0)
    assert refused.value.code == "rate_limit_exceeded"
    limits.admit(who("other", requests_per_minute=2), 0.0)
    limits.admit(me, 30.0)


def test_requests_at_once() -> None:
    limits, _ = build_limits()
    me = who(max_concurrent=2)
    limits.admit(me, 0.0)
    limits.admit(me, 0.0)
    for _ in range(3):
        with pytest.raises(RateLimitError):
            limits.admit(me, 0.0)
    limits.leave(me)
    limits.admit(me, 0.0)
    assert dict(limits.uses()) == {"t": TenantUse(3, 0, 2)}


def test_each_kind_is_counted_by_itself() -> None:
    limits, _ = build_limits()
    me = who(max_concurrent=1)
    kinds = (GENERATION, DOCUMENT, LOOKUP)
    for charge in kinds:
        limits.admit(me, 0.0, charge)
    for charge in (*kinds, POLL):
        with pytest.raises(RateLimitError, match=f"1 {charge.kind.value} at once"):
            limits.admit(me, 0.0, charge)
    assert dict(limits.uses()) == {"t": TenantUse(3, 0, 1, 1, 1)}
    limits.leave(me, DOCUMENT)
    limits.admit(me, 0.0, DOCUMENT)


@pytest.mark.parametrize(
    ("use", "charge"), [((0, 0, 1), GENERATION), ((0, 0, 0, 1), DOCUMENT), ((0, 0, 0, 0, 1), POLL)]
)
def test_each_kind_is_counted_over_all_routers(use: tuple[int, ...], charge: Charge) -> None:
    limits, _ = build_limits()
    me = who(max_concurrent=1)
    limits.absorb((RouterReport("other", tenants=(("t", TenantUse(*use)),)),))
    for each in (GENERATION, DOCUMENT, POLL):
        if each is charge:
            with pytest.raises(RateLimitError):
                limits.admit(me, 0.0, each)
        else:
            limits.admit(me, 0.0, each)


def test_looking_after_a_job_is_cheaper_than_a_request() -> None:
    limits, _ = build_limits()
    me = who(requests_per_minute=2)
    for _ in range(10):
        limits.admit(me, 0.0, POLL)
        limits.leave(me, POLL)
    limits.admit(me, 0.0)
    with pytest.raises(RateLimitError):
        limits.admit(me, 0.0)


def test_tokens_are_reserved_and_settled() -> None:
    limits, _ = build_limits()
    me = who(tokens_per_minute=1000)
    limits.reserve_tokens(me, 900, 0.0)
    with pytest.raises(RateLimitError) as refused:
        limits.reserve_tokens(me, 200, 0.0)
    assert refused.value.retry_after_s == pytest.approx(6.0)
    limits.settle(me, 900, 300, 0.0)
    limits.reserve_tokens(me, 700, 0.0)
    limits.settle(me, 700, 2700, 0.0)  # the answer was longer
    with pytest.raises(RateLimitError) as refused:
        limits.reserve_tokens(me, 100, 0.0)
    assert refused.value.retry_after_s == pytest.approx(126.0)


def test_headers() -> None:
    limits, _ = build_limits()
    assert limits.headers(who(), 0.0) == []
    assert limits.headers(who(max_concurrent=3), 0.0) == []
    me = who(requests_per_minute=60, tokens_per_minute=1000)
    limits.admit(me, 0.0)
    limits.reserve_tokens(me, 2, 0.0)
    assert limits.headers(me, 0.0) == [
        (b"x-ratelimit-limit-requests", b"60"),
        (b"x-ratelimit-remaining-requests", b"59"),
        (b"x-ratelimit-reset-requests", b"1s"),
        (b"x-ratelimit-limit-tokens", b"1000"),
        (b"x-ratelimit-remaining-tokens", b"998"),
        (b"x-ratelimit-reset-tokens", b"120ms"),
    ]
    assert [name for name, _ in limits.headers(who("x", tokens_per_minute=5), 0.0)] == [
        b"x-ratelimit-limit-tokens",
        b"x-ratelimit-remaining-tokens",
        b"x-ratelimit-reset-tokens",
    ]


def test_a_changed_limit_keeps_what_was_used() -> None:
    limits, _ = build_limits()
    for _ in range(10):
        limits.admit(who(requests_per_minute=10), 0.0)
    limits.admit(who(requests_per_minute=12), 0.0)
    limits.admit(who(requests_per_minute=12), 0.0)
    with pytest.raises(RateLimitError):
        limits.admit(who(requests_per_minute=12), 0.0)
    with pytest.raises(RateLimitError):
        limits.admit(who(requests_per_minute=1), 0.0)
    with pytest.raises(RateLimitError):
        limits.admit(who(max_concurrent=12), 0.0)
    limits.admit(who(), 0.0)


def report(router_id: str, **uses: tuple[int, int, int]) -> RouterReport:
    return RouterReport(router_id, tenants=tuple((name, TenantUse(*use)) for name, use in uses.items()))


def remaining(limits: TenantLimits, identity: Identity, kind: str) -> int:
    return int(dict(limits.headers(identity, 0.0))[f"x-ratelimit-remaining-{kind}".encode()])


def test_what_others_let_through_is_debited_once() -> None:
    limits, _ = build_limits()
    me = who(requests_per_minute=100, tokens_per_minute=1000, max_concurrent=5)
    limits.admit(me, 0.0)
    limits.absorb((report("b", t=(50, 500, 0)),))  # a baseline
    assert remaining(limits, me, "requests") == 99
    for _ in range(3):
        limits.absorb((report("b", t=(60, 700, 4)), report("c", t=(1, 1, 0))))
    assert remaining(limits, me, "requests") == 89
    assert remaining(limits, me, "tokens") == 800
    with pytest.raises(RateLimitError):
        limits.admit(me, 0.0)  # four there and one here
    limits.absorb((report("b", t=(60, 700, 3)), report("c", t=(3, 1, 0))))
    limits.admit(me, 0.0)
    assert remaining(limits, me, "requests") == 86


def test_totals_that_fell_were_begun_anew() -> None:
    limits, _ = build_limits()
    me = who(requests_per_minute=100, tokens_per_minute=1000)
    limits.admit(me, 0.0)
    limits.absorb((report("b", t=(50, 500, 0)),))
    limits.absorb((report("b", t=(2, 20, 0)),))
    assert remaining(limits, me, "requests") == 97
    limits.absorb((report("b"),))
    limits.absorb((report("b", t=(3, 30, 0)),))
    assert remaining(limits, me, "requests") == 94
    limits.absorb(())
    limits.absorb((report("b", t=(90, 900, 0)),))  # silent in between: a baseline again
    assert remaining(limits, me, "requests") == 94


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 1000)), max_size=50))
def test_what_is_told_to_others_never_falls(steps: list[tuple[bool, int]]) -> None:
    limits, _ = build_limits()
    me = who()
    told, reserved, used_in_all = 0, [], 0
    for is_new, n in steps:
        if is_new:
            limits.reserve_tokens(me, n, 0.0)
            reserved.append(n)
        elif reserved:
            limits.settle(me, reserved.pop(), n, 0.0)
            used_in_all += n
        now = dict(limits.uses()).get("t", TenantUse()).num_tokens
        assert now >= told
        told = now
    assert told >= used_in_all


def test_who_was_not_seen_for_long_is_forgotten() -> None:
    limits, clock = build_limits()
    for i in range(100):
        limits.admit(who(f"t{i}", requests_per_minute=5), 0.0)
        limits.leave(who(f"t{i}"))
    limits.admit(who("runs"), 0.0)
    clock.now_s = 500.0
    assert len(limits.uses()) == 101
    clock.now_s = 700.0
    assert [name for name, _ in limits.uses()] == ["runs"]
    limits.leave(who("nobody knows"))
