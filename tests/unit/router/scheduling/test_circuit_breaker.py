from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serving.router.scheduling.circuit_breaker import NO_PROBE, Breakers, BreakerState
from serving.settings.router import BreakerSettings

SETTINGS = BreakerSettings(failures=3, open_s=1.0, max_open_s=5.0)


def opened(now_s: float = 0.0) -> Breakers:
    breakers = Breakers(SETTINGS)
    for _ in range(3):
        breakers.fail("a", NO_PROBE, now_s)
    return breakers


def test_failures_in_a_row_open_it_for_a_while() -> None:
    breakers = opened()
    assert breakers.state("a", 0.99) is BreakerState.OPEN
    assert breakers.blocked(0.99) == {"a"}
    assert breakers.state("a", 1.0) is BreakerState.HALF_OPEN
    assert breakers.blocked(1.0) == frozenset()
    assert breakers.next_change_s(0.5) == 1.0
    assert breakers.next_change_s(1.0) is None


def test_an_answer_in_between_forgets_failures() -> None:
    breakers = Breakers(SETTINGS)
    for _ in range(5):
        breakers.fail("a", NO_PROBE, 0.0)
        breakers.fail("a", NO_PROBE, 0.0)
        breakers.succeed("a", NO_PROBE)
    assert breakers.state("a", 0.0) is BreakerState.CLOSED


def test_one_probe_at_a_time() -> None:
    breakers = opened()
    probe = breakers.begin("a")
    assert probe != NO_PROBE
    assert breakers.blocked(2.0) == {"a"}
    breakers.release("a", probe)  # its client left
    assert breakers.blocked(2.0) == frozenset()
    assert breakers.state("a", 2.0) is BreakerState.HALF_OPEN


def test_a_probe_that_is_answered_closes_it() -> None:
    breakers = opened()
    breakers.succeed("a", breakers.begin("a"))
    assert breakers.state("a", 1.0) is BreakerState.CLOSED
    assert breakers.begin("a") == NO_PROBE


def test_every_failed_probe_doubles_the_pause_up_to_the_longest() -> None:
    breakers, now_s, pauses = opened(), 1.0, []
    for _ in range(5):
        breakers.fail("a", breakers.begin("a"), now_s)
        until_s = breakers.next_change_s(now_s)
        assert until_s is not None
        pauses.append(until_s - now_s)
        now_s = until_s
    assert pauses == pytest.approx([2, 4, 5, 5, 5])


@pytest.mark.parametrize("now_s", [0.5, 1.5])
def test_requests_that_began_before_tell_nothing_new(now_s: float) -> None:
    breakers = opened()
    state = breakers.state("a", now_s)
    breakers.fail("a", NO_PROBE, now_s)
    breakers.succeed("a", NO_PROBE)
    assert breakers.state("a", now_s) is state
    assert breakers.next_change_s(0.0) == 1.0


def test_a_probe_of_a_former_life_frees_nobody_elses_place() -> None:
    breakers = opened()
    old = breakers.begin("a")
    breakers.retain([])
    for _ in range(3):
        breakers.fail("a", NO_PROBE, 0.0)
    new = breakers.begin("a")
    breakers.release("a", old)
    breakers.succeed("a", old)
    assert breakers.blocked(2.0) == {"a"}
    breakers.succeed("a", new)
    assert breakers.blocked(2.0) == frozenset()


def test_who_left_is_forgotten() -> None:
    breakers = opened()
    breakers.retain(["b"])
    assert breakers.state("a", 0.0) is BreakerState.CLOSED
    assert breakers.next_change_s(0.0) is None


class Table(RuleBasedStateMachine):
    """The table at the head of the module, followed by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.breakers = Breakers(SETTINGS)
        self.now_s = 0.0
        self.failures, self.pause_s, self.until_s, self.probe = 0, 0.0, 0.0, NO_PROBE

    @property
    def state(self) -> BreakerState:
        if not self.pause_s:
            return BreakerState.CLOSED
        return BreakerState.OPEN if self.now_s < self.until_s else BreakerState.HALF_OPEN

    @rule(seconds=st.sampled_from([0.1, 1.0, 3.0]))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    @precondition(lambda self: self.state is BreakerState.HALF_OPEN and not self.probe)
    @rule()
    def begin_probe(self) -> None:
        self.probe = self.breakers.begin("a")
        assert self.probe != NO_PROBE

    @precondition(lambda self: self.probe != NO_PROBE)
    @rule(verdict=st.sampled_from(["success", "failure", "none"]))
    def end_probe(self, verdict: str) -> None:
        if verdict == "success":
            self.breakers.succeed("a", self.probe)
            self.failures, self.pause_s = 0, 0.0
        elif verdict == "failure":
            self.breakers.fail("a", self.probe, self.now_s)
            self.pause_s = min(2 * self.pause_s, 5.0)
            self.until_s = self.now_s + self.pause_s
        else:
            self.breakers.release("a", self.probe)
        self.probe = NO_PROBE

    @rule()
    def answer_another(self) -> None:
        self.breakers.succeed("a", NO_PROBE)
        if not self.pause_s:
            self.failures = 0

    @rule()
    def fail_another(self) -> None:
        self.breakers.fail("a", NO_PROBE, self.now_s)
        if not self.pause_s:
            self.failures += 1
            if self.failures == 3:
                self.failures, self.pause_s, self.until_s = 0, 1.0, self.now_s + 1.0

    @invariant()
    def agrees(self) -> None:
        assert self.breakers.state("a", self.now_s) is self.state
        is_blocked = self.state is BreakerState.OPEN or self.probe != NO_PROBE
        assert self.breakers.blocked(self.now_s) == ({"a"} if is_blocked else set())


TestTable = Table.TestCase
