"""Records to put into the books."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from serving.billing.periods import parse_time_ns
from serving.billing.records import LostTry, Outcome, RequestRecord, TokenCounts

NOON_NS = parse_time_ns("2026-11-23T12:00")
SAMPLE = RequestRecord(
    request_id="req-0",
    tenant_id="acme",
    key_id="key-1",
    model="nano",
    route="/v1/chat/completions",
    outcome=Outcome.COMPLETED,
    status=200,
    modes=("gundam", "gundam"),
    num_pages=2,
    tokens=TokenCounts(1000, 900, 100, 500),
    cost_nanodollars=80_000,
    price_version="base-12345678",
    replica_id="nano#1",
    num_tries=1,
    finish_reason="stop",
    arrived_ns=NOON_NS,
    first_byte_ns=NOON_NS + 10**9,
    ended_ns=NOON_NS + 2 * 10**9,
    router_id="router-1",
)


def make_record(number: int = 0, **changes: Any) -> RequestRecord:
    """The sample under a number of its own."""
    return replace(SAMPLE, **{"request_id": f"req-{number}", **changes})


NAMES = st.sampled_from(["acme", "beta", "", "ünï", "a,b", "=1+1"])
COUNTS = st.integers(0, 10**7)
TIMES = st.integers(NOON_NS - 40 * 86_400 * 10**9, NOON_NS + 40 * 86_400 * 10**9)
LOST = st.builds(LostTry, st.sampled_from(["nano#1", "nano#3"]), COUNTS, COUNTS)
RECORDS = st.builds(
    RequestRecord,
    request_id=st.uuids().map(str),
    tenant_id=NAMES,
    key_id=NAMES,
    model=st.sampled_from(["nano", "large", ""]),
    route=st.just("/v1/chat/completions"),
    outcome=st.sampled_from(Outcome),
    status=st.integers(200, 599),
    modes=st.lists(st.sampled_from(["tiny", "gundam"]), max_size=3).map(tuple),
    num_pages=st.integers(0, 16),
    tokens=st.builds(TokenCounts, COUNTS, COUNTS, COUNTS, COUNTS),
    is_estimated=st.booleans(),
    num_wasted_tokens=COUNTS,
    cost_nanodollars=st.integers(0, 10**12),
    replica_id=st.sampled_from(["", "nano#1", "nano#2"]),
    arrived_ns=TIMES,
    ended_ns=TIMES,
    is_stream=st.booleans(),
    router_id=st.sampled_from(["r1", "r2"]),
    lost_tries=st.lists(st.builds(LostTry, st.sampled_from(["nano#1", "nano#3"]), COUNTS, COUNTS), max_size=2).map(
        tuple
    ),
)
