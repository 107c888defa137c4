"""What users saw: counts and distributions that processes send to each other and put together. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from benchmarks.load.people import Manner
from benchmarks.quantiles import Histogram


class Outcome(StrEnum):
    COMPLETE = "complete"
    LEFT = "left"
    """The user's own doing."""
    REFUSED = "refused"
    """429 or 503 with Retry-After: the stack said no, in time and in words."""
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Answer:
    """One request as its client saw it, times in seconds."""

    manner: Manner
    outcome: Outcome
    whole_s: float
    first_s: float | None = None
    gaps_s: tuple[float, ...] = ()
    num_tokens: int = 0
    num_pages: int = 0
    dollars: float = 0.0
    reason: str = ""
    """Status and code of a refusal, or what went wrong."""


_TIMES = ("first_s", "gap_s", "whole_s", "late_s")


@dataclass
class Tally:
    """The sum of answers."""

    outcomes: Counter[str] = field(default_factory=Counter)
    """By manner and outcome, as `stream complete`."""
    refusals: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    num_visits: int = 0
    num_tokens: int = 0
    num_pages: int = 0
    nanodollars: int = 0
    times: dict[str, Histogram] = field(default_factory=lambda: {name: Histogram() for name in _TIMES})
    """`late_s` is the generator's own: from the moment a user should have come to the moment it did."""

    def arrive(self, late_s: float) -> None:
        """A user came, so much later than the schedule says."""
        self.num_visits += 1
        self.times["late_s"].add(late_s)

    def add(self, answer: Answer) -> None:
        """A request has ended."""
        self.outcomes[f"{answer.manner} {answer.outcome}"] += 1
        if answer.outcome is Outcome.REFUSED:
            self.refusals[answer.reason] += 1
            return
        if answer.outcome is Outcome.ERROR:
            self.errors[answer.reason] += 1
            return
        if answer.first_s is not None:
            self.times["first_s"].add(answer.first_s)
        for gap_s in answer.gaps_s:
            self.times["gap_s"].add(gap_s)
        if answer.outcome is Outcome.COMPLETE:
            self.times["whole_s"].add(answer.whole_s)
            self.num_tokens += answer.num_tokens
            self.num_pages += answer.num_pages
            self.nanodollars += round(answer.dollars * 1e9)

    def dump(self) -> dict[str, Any]:
        """For a message to the process that puts all together."""
        return {
            "outcomes": dict(self.outcomes),
            "refusals": dict(self.refusals),
            "errors": dict(self.errors),
            "numbers": [self.num_visits, self.num_tokens, self.num_pages, self.nanodollars],
            "times": {name: histogram.dump() for name, histogram in self.times.items()},
        }

    def merge(self, given: Mapping[str, Any]) -> None:
        """Add what another process has dumped."""
        self.outcomes.update(given["outcomes"])
        self.refusals.update(given["refusals"])
        self.errors.update(given["errors"])
        visits, tokens, pages, nanodollars = given["numbers"]
        self.num_visits += visits
        self.num_tokens += tokens
        self.num_pages += pages
        self.nanodollars += nanodollars
        for name, histogram in given["times"].items():
            self.times[name].merge(Histogram.load(histogram))

    def summarize(self, took_s: float) -> dict[str, Any]:
        """Rates over the time that the run took, and every distribution; what `make load` writes and prints."""
        return {
            "took_s": took_s,
            "visits": self.num_visits,
            "requests": sum(self.outcomes.values()),
            "outcomes": dict(sorted(self.outcomes.items())),
            "refusals": dict(self.refusals),
            "errors": dict(self.errors),
            "num_refused": sum(self.refusals.values()),
            "num_errors": sum(self.errors.values()),
            "pages": self.num_pages,
            "pages_per_s": self.num_pages / took_s,
            "tokens": self.num_tokens,
            "tokens_per_s": self.num_tokens / took_s,
            "dollars": self.nanodollars / 1e9,
            "dollars_per_1000_pages": self.nanodollars / 1e6 / self.num_pages if self.num_pages else None,
            **{name: self.times[name].summary() for name in _TIMES},
        }
