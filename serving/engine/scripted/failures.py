"""A small language for the failures of a scripted engine, and the counters behind it. Pure.

A failure is written `KIND[:VALUE][:KEY=NUMBER]...`:

    status:CODE       answers CODE in vLLM's error shape; `retry_after_s=N` adds the header
    refuse            closes the connection without a byte of an answer
    slow_start:S      waits S seconds before the first token
    stall             falls silent until the client leaves, or for `for_s=S` seconds
    die               cuts the connection; a stream has got its headers, a whole answer no byte
    error             a stream gets vLLM's error event, a whole answer a 500
    exit              ends the process at once, as SIGKILL does
    dead              the engine dies and its HTTP server lives: 500 to all from then on, 503 on /health

`stall`, `die`, `error`, `exit` and `dead` happen after `after_tokens=N` tokens of the answer (default 0), and not at
all in a shorter answer. The choice of requests works the same for all kinds; only the first failure of a request
happens:

    every=N           every Nth request (default 1: all)
    after_requests=N  skips the first N requests; `every` counts from there
    times=N           at most N requests

For example, "die:after_tokens=5:every=20" cuts every twentieth answer after five tokens, and "exit:after_requests=100"
ends the process at the 101st request. Only generation requests count, in the order of arrival.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from serving.errors import SettingsError


class FailureKind(StrEnum):
    STATUS = "status"
    REFUSE = "refuse"
    SLOW_START = "slow_start"
    STALL = "stall"
    DIE = "die"
    ERROR = "error"
    EXIT = "exit"
    DEAD = "dead"


_WITH_VALUE = (FailureKind.STATUS, FailureKind.SLOW_START)
_MIDWAY = (FailureKind.STALL, FailureKind.DIE, FailureKind.ERROR, FailureKind.EXIT, FailureKind.DEAD)
_COUNTING = ("every", "after_requests", "times")
_KEYS: dict[FailureKind, tuple[str, ...]] = {
    FailureKind.STATUS: ("retry_after_s",),
    **dict.fromkeys(_MIDWAY, ("after_tokens",)),
    FailureKind.STALL: ("after_tokens", "for_s"),
}


@dataclass(frozen=True, slots=True)
class ScriptedFailure:
    """One failure of the script."""

    kind: FailureKind
    value: float = 0.0
    """The HTTP status, or seconds."""
    after_tokens: int = 0
    every: int = 1
    after_requests: int = 0
    times: int | None = None
    retry_after_s: int | None = None
    for_s: float | None = None

    @property
    def is_midway(self) -> bool:
        """Whether it happens at a certain token."""
        return self.kind in _MIDWAY

    def strikes(self, number: int, num_struck: int) -> bool:
        """Whether it applies to request `number` (from 1) after it applied to `num_struck` requests."""
        counted = number - self.after_requests
        return counted > 0 and counted % self.every == 0 and (self.times is None or num_struck < self.times)


@dataclass(slots=True)
class FailureScript:
    """Counts requests and chooses the failure of each."""

    failures: tuple[ScriptedFailure, ...] = ()
    num_requests: int = 0
    _struck: Counter[int] = field(default_factory=Counter)

    def next(self) -> ScriptedFailure | None:
        """Return the failure of the request that has just arrived."""
        self.num_requests += 1
        for place, failure in enumerate(self.failures):
            if failure.strikes(self.num_requests, self._struck[place]):
                self._struck[place] += 1
                return failure
        return None


def parse_failures(lines: Iterable[str]) -> FailureScript:
    """Parse a script.

    Raises:
        SettingsError: a line is not valid in the language above.
    """
    return FailureScript(tuple(_parse(line) for line in lines))


def _parse(line: str) -> ScriptedFailure:
    name, *words = line.split(":")
    try:
        kind = FailureKind(name)
    except ValueError:
        raise SettingsError(f"failure {line!r}: there is no {name!r}, only {', '.join(FailureKind)}") from None
    given: dict[str, float] = {}
    if kind in _WITH_VALUE:
        if not words or "=" in words[0]:
            raise SettingsError(f"failure {line!r}: {kind} needs a number, as in {kind}:503")
        given["value"] = _number(line, words.pop(0))
    allowed = (*_KEYS.get(kind, ()), *_COUNTING)
    for word in words:
        key, _, value = word.partition("=")
        if key not in allowed:
            raise SettingsError(f"failure {line!r}: {kind} knows {', '.join(allowed)}, not {key!r}")
        given[key] = _number(line, value)
    return _build(line, kind, given)


def _build(line: str, kind: FailureKind, given: dict[str, float]) -> ScriptedFailure:
    for key in (*_COUNTING, "after_tokens", "retry_after_s"):
        if key in given and not given[key].is_integer():
            raise SettingsError(f"failure {line!r}: {key} must be a whole number")
    if given.get("every", 1) < 1:
        raise SettingsError(f"failure {line!r}: every must be 1 or more")
    if kind is FailureKind.STATUS and not (given["value"].is_integer() and 400 <= given["value"] <= 599):
        raise SettingsError(f"failure {line!r}: the status must be one of an error, 400 to 599")

    def whole(key: str) -> int | None:
        return int(given[key]) if key in given else None

    return ScriptedFailure(
        kind=kind,
        value=given.get("value", 0.0),
        after_tokens=whole("after_tokens") or 0,
        every=whole("every") or 1,
        after_requests=whole("after_requests") or 0,
        times=whole("times"),
        retry_after_s=whole("retry_after_s"),
        for_s=given.get("for_s"),
    )


def _number(line: str, word: str) -> float:
    if not word.replace(".", "", 1).isdecimal():
        raise SettingsError(f"failure {line!r}: {word!r} is not a number")
    return float(word)
