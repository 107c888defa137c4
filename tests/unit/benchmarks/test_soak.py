"""A soak's verdict: what is kept, what is not, and how growth is told from coming and going."""

from __future__ import annotations

from collections import Counter

import pytest

from benchmarks.faults.client import Seen, Told
from benchmarks.soak.verdict import SETTLED_AFTER_S, find_growth, judge_books, judge_growth, judge_requests
from benchmarks.soak.watch import Series

CLIENTS = 10


def series(mib_per_s: float = 0.0, files_per_s: float = 0.0, seconds: int = 300, part: str = "router") -> Series:
    at_s = [float(second) for second in range(0, seconds, 2)]
    mib = [100 + mib_per_s * at for at in at_s]
    return Series(part, 1, at_s, mib, [round(50 + files_per_s * at) for at in at_s])


@pytest.mark.parametrize(
    ("mib_per_s", "files_per_s", "is_flat"), [(0, 0, True), (0.5, 0, False), (0, 0.5, False), (0.05, 0.05, True)]
)
def test_a_process_that_grows_is_found(mib_per_s: float, files_per_s: float, is_flat: bool) -> None:
    (growth,) = find_growth([series(mib_per_s, files_per_s)], CLIENTS)
    assert growth.is_flat is is_flat
    assert [check.is_kept for check in judge_growth([growth])] == [is_flat]


def test_what_a_process_takes_at_its_start_is_no_growth() -> None:
    starting = series()
    starting.mib = [10.0 if at_s < SETTLED_AFTER_S else 100.0 for at_s in starting.at_s]
    (growth,) = find_growth([starting], CLIENTS)
    assert growth.is_flat


def test_a_process_that_was_killed_soon_says_nothing() -> None:
    assert find_growth([series(5, 5, seconds=int(SETTLED_AFTER_S) + 8)], CLIENTS) == []


def test_one_that_grows_is_told_for_all_of_its_part() -> None:
    (check,) = judge_growth(find_growth([series(), series(mib_per_s=1)], CLIENTS))
    assert not check.is_kept
    assert "2 lived" in check.asked


def kept(streams: dict[Seen, int], whole: dict[Seen, int], lost: int = 0) -> bool:
    checks = judge_requests(Counter(streams), Counter(whole), lost, 5, {"router": 1})
    return all(check.is_kept for check in checks)


def test_clients_may_see_what_a_kill_excuses_and_nothing_else() -> None:
    good = {Seen.COMPLETE: 10}
    assert kept({**good, Seen.TOLD: 2, Seen.RESET: 2}, {**good, Seen.RESET: 1})
    assert not kept({**good, Seen.SILENT: 1}, good)
    assert not kept(good, {**good, Seen.FAILED: 1})
    assert not kept(good, good, lost=1)


def test_the_books_must_hold_what_clients_were_told() -> None:
    told = [Told("a", 60, 700), Told("b", 60, 700)]
    rows = {"a": ("completed", 60, 700), "b": ("completed", 60, 700), "c": ("aborted", 3, 40)}
    assert all(check.is_kept for check in judge_books(told, rows))
    wrong = {**rows, "b": ("completed", 60, 701)}
    assert [check.is_kept for check in judge_books(told, wrong)] == [True, False, True]
    assert [check.is_kept for check in judge_books(told, {"a": rows["a"]})] == [False, True, True]
    assert [check.is_kept for check in judge_books([told[0], told[0]], rows)] == [True, True, False]
