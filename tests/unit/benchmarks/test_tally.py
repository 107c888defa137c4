"""Counts and distributions that several processes put together."""

from __future__ import annotations

import json
import math
from random import Random

import pytest

from benchmarks.load.people import Manner
from benchmarks.load.tally import Answer, Outcome, Tally
from benchmarks.quantiles import Histogram, quantile, thin


def test_quantiles_are_values_that_were_seen() -> None:
    values = [3.0, 1.0, 2.0, 4.0]
    assert [quantile(values, part) for part in (0, 0.25, 0.5, 0.51, 1)] == [1.0, 1.0, 2.0, 3.0, 4.0]
    assert math.isnan(quantile([], 0.5))


def test_a_thinned_distribution_keeps_its_ends_and_its_middle() -> None:
    assert thin(range(101), 5) == [0, 25, 50, 75, 100]
    assert thin([], 5) == []


def test_a_histogram_is_right_to_two_percent_and_adds_up_over_processes() -> None:
    random = Random(1)
    values = [random.lognormvariate(-3, 1) for _ in range(5000)]
    whole, parts = Histogram(), [Histogram() for _ in range(3)]
    for index, value in enumerate(values):
        whole.add(value)
        parts[index % 3].add(value)
    together = Histogram()
    for part in parts:
        together.merge(Histogram.load(json.loads(json.dumps(part.dump()))))
    assert together.counts == whole.counts
    assert together.mean == pytest.approx(sum(values) / len(values))
    for share in (0.5, 0.9, 0.99):
        assert together.quantile(share) == pytest.approx(quantile(values, share), rel=0.021)


def test_an_empty_histogram_has_no_summary() -> None:
    assert Histogram().summary() == {}


def answers() -> list[Answer]:
    return [
        Answer(Manner.STREAM, Outcome.COMPLETE, 2.0, 0.5, (0.1, 0.2), num_tokens=30, num_pages=1, dollars=0.000002),
        Answer(Manner.WHOLE, Outcome.COMPLETE, 1.0, num_tokens=20, num_pages=1, dollars=0.000001),
        Answer(Manner.LEAVES, Outcome.LEFT, 0.7, 0.4, (0.1,)),
        Answer(Manner.STREAM, Outcome.REFUSED, 0.01, reason="503 overloaded"),
        Answer(Manner.WHOLE, Outcome.ERROR, 0.02, reason="502 replica_unreachable"),
    ]


def test_refusals_are_apart_from_errors_and_cost_no_time() -> None:
    tally = Tally()
    tally.arrive(0.001)
    for answer in answers():
        tally.add(answer)
    summary = tally.summarize(10)
    assert summary["refusals"] == {"503 overloaded": 1}
    assert summary["errors"] == {"502 replica_unreachable": 1}
    assert (summary["pages"], summary["tokens_per_s"], summary["dollars"]) == (2, 5.0, 0.000003)
    assert len(tally.times["whole_s"]) == 2
    assert len(tally.times["first_s"]) == 2
    assert len(tally.times["gap_s"]) == 3


def test_what_processes_send_adds_up() -> None:
    whole, together = Tally(), Tally()
    for answer in answers():
        whole.add(answer)
        part = Tally()
        part.add(answer)
        together.merge(json.loads(json.dumps(part.dump())))
    assert together.summarize(5) == whole.summarize(5)
