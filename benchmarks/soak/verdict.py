"""What a soak must show, and whether it did. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.faults.client import Seen, Told
from benchmarks.soak.watch import Series

SETTLED_AFTER_S = 40.0
"""A process takes what it will need in its first time: readings before are not compared."""
_MEMORY_PART, _MEMORY_MIB = 0.10, 16.0
"""How much more memory a process may have at the end: connections and caches come and go."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was asked, in words, and what was found."""

    asked: str
    found: str
    is_kept: bool


@dataclass(frozen=True, slots=True)
class Growth:
    """Of one process: medians of the first and the last third of its settled life."""

    part: str
    pid: int
    mib: tuple[float, float]
    files: tuple[float, float]
    num_clients: int
    """When another router dies its clients come to this one: a descriptor for each, and one for each of their
    connections to an engine."""

    @property
    def is_flat(self) -> bool:
        few_mib = self.mib[1] <= self.mib[0] * (1 + _MEMORY_PART) + _MEMORY_MIB
        return few_mib and self.files[1] <= self.files[0] + 2 * self.num_clients


def find_growth(series: Iterable[Series], num_clients: int) -> list[Growth]:
    """Of every process that lived long enough to say something."""
    found = []
    for each in series:
        settled = [index for index, at_s in enumerate(each.at_s) if at_s - each.at_s[0] >= SETTLED_AFTER_S]
        if len(settled) < 9:
            continue
        third = len(settled) // 3
        ends = (settled[:third], settled[-third:])
        mib = tuple(statistics.median(each.mib[index] for index in end) for end in ends)
        files = tuple(float(statistics.median(each.files[index] for index in end)) for end in ends)
        found.append(Growth(each.part, each.pid, (mib[0], mib[1]), (files[0], files[1]), num_clients))
    return found


def judge_growth(growths: Sequence[Growth]) -> list[Check]:
    """The worst of each part."""
    checks = []
    for part in dict.fromkeys(growth.part for growth in growths):
        own = [growth for growth in growths if growth.part == part]
        worst = max(own, key=lambda growth: (not growth.is_flat, growth.mib[1] - growth.mib[0]))
        found = (
            f"{worst.mib[0]:.0f} to {worst.mib[1]:.0f} MiB, {worst.files[0]:.0f} to {worst.files[1]:.0f} descriptors"
        )
        asked = f"memory and descriptors of each {part} stay ({len(own)} lived long enough; the worst)"
        checks.append(Check(asked, found, all(growth.is_flat for growth in own)))
    return checks


def judge_requests(
    streams: Mapping[Seen, int], whole: Mapping[Seen, int], lost: int, num_left: int, killed: Mapping[str, int]
) -> list[Check]:
    """What clients saw. Streams of an engine that died may break if they say so, and so may those of a router."""
    silent = streams.get(Seen.SILENT, 0) + whole.get(Seen.SILENT, 0)
    failed = streams.get(Seen.FAILED, 0) + whole.get(Seen.FAILED, 0)
    complete = f"{whole.get(Seen.COMPLETE, 0):,} complete, {lost} lost"
    broken = f"{streams.get(Seen.TOLD, 0)} told by an event, {streams.get(Seen.RESET, 0)} reset with their router"
    quiet = f"{streams.get(Seen.COMPLETE, 0):,} complete, {silent} silent"
    kills = sum(killed.values())
    return [
        Check("whole requests: none lost, their clients asking again as the official ones do", complete, lost == 0),
        Check("streams: none breaks in silence", quiet, not silent),
        Check(f"streams that {kills} kills broke know it", broken, bool(kills) or not streams.get(Seen.TOLD, 0)),
        Check("no status but 200 and documented refusals", f"{failed} others", not failed),
        Check("clients left in the middle of streams", f"{num_left:,}", num_left > 0),
    ]


def judge_books(told: Sequence[Told], rows: Mapping[str, tuple[str, int, int]]) -> list[Check]:
    """Every answer that came whole has its row, of the tokens and the cost that it told.

    Args:
        told: what answers said of themselves.
        rows: outcome, completion tokens and nanodollars by request id.
    """
    missing = [each for each in told if each.request_id not in rows]
    wrong = [
        each
        for each in told
        if each.request_id in rows and rows[each.request_id] != ("completed", each.num_tokens, each.nanodollars)
    ]
    doubled = len(told) - len({each.request_id for each in told})
    found = f"{len(told):,} answers, {len(missing)} without"
    return [
        Check("every whole answer has one row in the ledger", found, not missing),
        Check("of the tokens and the cost that the client was told", f"{len(wrong)} differ", not wrong),
        Check("no two answers have one id", f"{doubled} doubled", not doubled),
    ]
