"""Billing days and months, in UTC; a request belongs to those in which it arrived. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from functools import lru_cache

NS_PER_S = 10**9
NS_PER_DAY = 86_400 * NS_PER_S
NS_PER_HOUR = 3600 * NS_PER_S
_EPOCH = date(1970, 1, 1)
_MONTH = re.compile(r"(\d{4})-(0[1-9]|1[0-2])", re.ASCII)


@dataclass(frozen=True, slots=True)
class Window:
    """From `begin_ns` up to but excluding `end_ns`, in nanoseconds since the epoch."""

    begin_ns: int
    end_ns: int


def start_of_day_ns(day: date) -> int:
    """Midnight at the start of a day."""
    return (day - _EPOCH).days * NS_PER_DAY


def day_of(time_ns: int) -> str:
    """The day of a time, as `2026-11-23`."""
    return (_EPOCH + timedelta(days=time_ns // NS_PER_DAY)).isoformat()


def month_of(time_ns: int) -> str:
    """The month of a time, as `2026-11`."""
    return _month_of_day(time_ns // NS_PER_DAY)


@lru_cache(maxsize=1024)
def _month_of_day(day: int) -> str:
    return (_EPOCH + timedelta(days=day)).isoformat()[:7]


def month_window(month: str) -> Window:
    """The window of a month such as `2026-11`.

    Raises:
        ValueError: it does not have this form.
    """
    match = _MONTH.fullmatch(month)
    if match is None or not 1970 <= int(match[1]) < 9999:
        raise ValueError(f"{month!r} is not a month such as 2026-11")
    first = date(int(match[1]), int(match[2]), 1)
    following = (first + timedelta(days=31)).replace(day=1)
    return Window(start_of_day_ns(first), start_of_day_ns(following))


def parse_time_ns(text: str) -> int:
    """A date or time in ISO 8601; without an offset it is UTC.

    Raises:
        ValueError: it is neither.
    """
    moment = datetime.fromisoformat(text)
    moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    since = moment - datetime(1970, 1, 1, tzinfo=UTC)
    return (since.days * 86_400 + since.seconds) * NS_PER_S + since.microseconds * 1000
