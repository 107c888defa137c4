from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.billing.periods import NS_PER_DAY, day_of, month_of, month_window, parse_time_ns

MOMENTS = st.datetimes(datetime(1970, 1, 1), datetime(2200, 1, 1))


@given(MOMENTS)
def test_days_and_months_are_those_of_the_calendar(moment: datetime) -> None:
    time_ns = parse_time_ns(moment.isoformat())
    assert time_ns == int(moment.replace(tzinfo=UTC).timestamp()) * 10**9 + moment.microsecond * 1000
    assert day_of(time_ns) == moment.date().isoformat()
    assert month_of(time_ns) == moment.strftime("%Y-%m")
    window = month_window(month_of(time_ns))
    assert window.begin_ns <= time_ns < window.end_ns
    assert month_of(window.begin_ns - 1 if window.begin_ns else 0) != month_of(window.end_ns)


def test_a_month_is_as_long_as_it_is() -> None:
    days = [(w.end_ns - w.begin_ns) // NS_PER_DAY for w in (month_window(f"2028-{m:02d}") for m in range(1, 13))]
    assert days == [31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31]


@pytest.mark.parametrize("text", ["", "2026", "2026-13", "2026-00", "26-11", "2026-11-01", "1969-12", "２０２６-11"])
def test_what_is_no_month_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a month such as 2026-11"):
        month_window(text)


def test_an_offset_is_taken_into_account() -> None:
    assert parse_time_ns("2026-11-23T01:00:00+02:00") == parse_time_ns("2026-11-22T23:00Z")
    with pytest.raises(ValueError, match="Invalid isoformat"):
        parse_time_ns("yesterday")
