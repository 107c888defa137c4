from __future__ import annotations

import pytest

from serving.engine.scripted.failures import FailureKind, ScriptedFailure, parse_failures
from serving.errors import SettingsError


@pytest.mark.parametrize(
    ("line", "failure"),
    [
        ("refuse", ScriptedFailure(FailureKind.REFUSE)),
        ("status:503:every=10", ScriptedFailure(FailureKind.STATUS, value=503, every=10)),
        ("status:429:retry_after_s=2", ScriptedFailure(FailureKind.STATUS, value=429, retry_after_s=2)),
        ("die:after_tokens=5:every=20", ScriptedFailure(FailureKind.DIE, after_tokens=5, every=20)),
        ("exit:after_requests=100", ScriptedFailure(FailureKind.EXIT, after_requests=100)),
        (
            "stall:after_tokens=3:for_s=0.5:times=2",
            ScriptedFailure(FailureKind.STALL, after_tokens=3, for_s=0.5, times=2),
        ),
        ("slow_start:1.5", ScriptedFailure(FailureKind.SLOW_START, value=1.5)),
    ],
)
def test_a_line_says_what_and_when(line: str, failure: ScriptedFailure) -> None:
    assert parse_failures([line]).failures == (failure,)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "explode",
        "status",
        "status:every=2",
        "status:200",
        "status:503.5",
        "slow_start",
        "die:every=0",
        "die:every=1.5",
        "die:every=",
        "die:every",
        "die:every=-1",
        "die:every=²",
        "die:for_s=1",
        "refuse:after_tokens=1",
    ],
)
def test_a_line_that_is_not_understood_is_refused_whole(line: str) -> None:
    with pytest.raises(SettingsError, match=repr(line)):
        parse_failures([line])


def struck(*lines: str, num_requests: int) -> list[str | None]:
    script = parse_failures(lines)
    failures = [script.next() for _ in range(num_requests)]
    return [failure.kind.value if failure else None for failure in failures]


def test_every_counts_from_the_first_request() -> None:
    assert struck("die:every=3", num_requests=7) == [None, None, "die", None, None, "die", None]


def test_the_first_requests_can_be_spared() -> None:
    assert struck("die:after_requests=2:every=2", num_requests=6) == [None, None, None, "die", None, "die"]


def test_a_failure_can_be_limited_to_a_number_of_requests() -> None:
    assert struck("die:times=2", num_requests=4) == ["die", "die", None, None]


def test_the_first_failure_that_strikes_is_the_only_one() -> None:
    assert struck("refuse:every=2", "die:times=2", num_requests=4) == ["die", "refuse", "die", "refuse"]
