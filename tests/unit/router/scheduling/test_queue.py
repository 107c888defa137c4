from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serving.errors import OverloadedError
from serving.router.scheduling.queue import AdmissionQueue, ServiceRate, Waiter, check_deadline, retry_after_s
from serving.settings.tenants import Priority

HIGH, NORMAL, LOW = Priority.HIGH, Priority.NORMAL, Priority.LOW
TENANTS = st.sampled_from(["a", "b", "c", "d"])
WORKS = st.integers(1, 10_000)


def waiter(
    tenant: str = "a", work: int = 100, priority: Priority = NORMAL, entered_s: float = 0.0, deadline_s: float = 600.0
) -> Waiter:
    return Waiter(tenant, priority, work, entered_s, deadline_s)


def drain(queue: AdmissionQueue[Waiter]) -> list[Waiter]:
    served = []
    while (head := queue.head()) is not None:
        assert queue.head() is head
        queue.pop(head)
        served.append(head)
    return served


def test_nobody_is_next_in_an_empty_queue() -> None:
    queue: AdmissionQueue[Waiter] = AdmissionQueue(4)
    assert queue.head() is None
    assert queue.next_deadline_s() == math.inf
    assert not queue


@given(st.lists(st.tuples(TENANTS, WORKS, st.sampled_from(Priority)), max_size=40))
def test_classes_go_in_order_and_tenants_keep_theirs(asked: list[tuple[str, int, Priority]]) -> None:
    queue: AdmissionQueue[Waiter] = AdmissionQueue(1000)
    waiters = [waiter(*one) for one in asked]
    for one in waiters:
        assert queue.push(one) is None
    served = drain(queue)
    assert Counter(map(id, served)) == Counter(map(id, waiters))  # everybody, once
    ranks = [list(Priority).index(one.priority) for one in served]
    assert ranks == sorted(ranks)
    for key in {(one.tenant_id, one.priority) for one in waiters}:
        assert [one for one in served if (one.tenant_id, one.priority) == key] == [
            one for one in waiters if (one.tenant_id, one.priority) == key
        ]
    assert queue.work == 0


@given(st.lists(st.lists(WORKS, min_size=1, max_size=30), min_size=2, max_size=5))
def test_tenants_that_wait_get_equal_work(works: list[list[int]]) -> None:
    """Shreedhar and Varghese, lemma 2: while both have something waiting, two flows differ by less than three of the
    largest requests (the quantum is one of them)."""
    queue: AdmissionQueue[Waiter] = AdmissionQueue(1000)
    for i, mine in enumerate(works):
        for work in mine:
            queue.push(waiter(f"t{i}", work))
    largest = max(max(mine) for mine in works)
    left = Counter({f"t{i}": len(mine) for i, mine in enumerate(works)})
    done: Counter[str] = Counter()
    while (head := queue.head()) is not None and min(left.values()) > 0:
        queue.pop(head)
        done[head.tenant_id] += head.work
        left[head.tenant_id] -= 1
        if min(left.values()) > 0:
            amounts = [done[tenant] for tenant in left]
            assert max(amounts) - min(amounts) <= 3 * largest


def test_a_flood_does_not_delay_a_tenant_with_one_request() -> None:
    queue: AdmissionQueue[Waiter] = AdmissionQueue(1000)
    for _ in range(100):
        queue.push(waiter("flood"))
    light = waiter("light")
    queue.push(light)
    assert drain(queue).index(light) <= 2


def test_the_head_that_does_not_fit_is_passed_by_nobody_of_its_class() -> None:
    queue: AdmissionQueue[Waiter] = AdmissionQueue(1000)
    large = waiter("large", 50_000)
    queue.push(large)
    assert queue.head() is large
    for i in range(20):
        queue.push(waiter(f"small{i}", 1))
        assert queue.head() is large
    assert queue.has_ahead(NORMAL)
    assert queue.has_ahead(LOW)
    assert not queue.has_ahead(HIGH)
    first = waiter("vip", 1, HIGH)
    queue.push(first)
    assert queue.head() is first


def test_a_full_queue_refuses_who_has_no_more_right_than_those_in_it() -> None:
    queue: AdmissionQueue[Waiter] = AdmissionQueue(3)
    for tenant in ("a", "b", "c"):
        queue.push(waiter(tenant))
    for newcomer in (waiter("a"), waiter("d"), waiter("d", priority=LOW)):
        with pytest.raises(OverloadedError) as refused:
            queue.push(newcomer)
        assert refused.value.code == "overloaded"
    assert len(queue) == 3


def test_a_queue_without_places_refuses_everybody() -> None:
    queue: AdmissionQueue[Waiter] = AdmissionQueue(0)
    with pytest.raises(OverloadedError):
        queue.push(waiter(priority=HIGH))


def test_a_full_queue_gives_way_to_a_higher_class_and_to_other_tenants() -> None:
    queue: AdmissionQueue[Waiter] = AdmissionQueue(4)
    flood = [waiter("flood", entered_s=float(i)) for i in range(4)]
    for one in flood:
        queue.push(one)
    assert queue.push(waiter("light")) is flood[3]
    assert queue.push(waiter("vip", priority=HIGH)) is flood[2]
    with pytest.raises(OverloadedError):
        queue.push(waiter("flood"))
    assert len(queue) == 4


def test_deadlines_are_met_to_the_moment() -> None:
    queue: AdmissionQueue[Waiter] = AdmissionQueue(10)
    late, soon = waiter(deadline_s=9.0), waiter(deadline_s=3.0)
    queue.push(late)
    queue.push(soon)
    assert queue.next_deadline_s() == 3.0
    assert queue.take_expired(2.99) == []
    assert queue.take_expired(3.0) == [soon]
    assert not queue.remove(soon)
    assert queue.next_deadline_s() == 9.0


def test_the_oldest_can_be_taken_out() -> None:
    queue: AdmissionQueue[Waiter] = AdmissionQueue(10)
    waiters = [waiter(entered_s=float(i), priority=p) for i, p in enumerate((LOW, HIGH, NORMAL))]
    for one in waiters:
        queue.push(one)
    assert list(queue) == waiters
    assert queue.take_older(1.0) == waiters[:2]
    assert drain(queue) == waiters[2:]


def test_who_leaves_leaves_nothing_behind() -> None:
    queue: AdmissionQueue[Waiter] = AdmissionQueue(10)
    for _ in range(10_000):
        one = waiter()
        queue.push(one)
        assert queue.remove(one)
    assert queue.num_deadlines < 200
    assert queue.head() is None


def test_the_work_ahead_is_what_goes_first() -> None:
    queue: AdmissionQueue[Waiter] = AdmissionQueue(100)
    for _ in range(10):
        queue.push(waiter("flood", 100))
    queue.push(waiter("vip", 70, HIGH))
    queue.push(waiter("late", 5, LOW))
    assert queue.work_ahead("flood", NORMAL, 100) == 70 + 1000
    assert queue.work_ahead("light", NORMAL, 100) == 70 + 100  # one turn of the flood's
    assert queue.work_ahead("vip", HIGH, 100) == 70
    assert queue.work_ahead("late", LOW, 100) == 70 + 1000 + 5


class Queue(RuleBasedStateMachine):
    """Nobody is lost or counted twice, whatever happens in whatever order."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: AdmissionQueue[Waiter] = AdmissionQueue(12)
        self.waiting: dict[Waiter, None] = {}
        self.now_s = 0.0

    @rule(tenant=TENANTS, work=WORKS, priority=st.sampled_from(Priority), patience_s=st.floats(0.1, 20))
    def push(self, tenant: str, work: int, priority: Priority, patience_s: float) -> None:
        one = waiter(tenant, work, priority, self.now_s, self.now_s + patience_s)
        try:
            pushed_out = self.queue.push(one)
        except OverloadedError:
            assert len(self.waiting) == 12
            return
        if pushed_out is not None:
            assert len(self.waiting) == 12
            del self.waiting[pushed_out]
        self.waiting[one] = None

    @precondition(lambda self: self.waiting)
    @rule()
    def serve(self) -> None:
        head = self.queue.head()
        assert head is not None
        assert head.priority == min((one.priority for one in self.waiting), key=list(Priority).index)
        self.queue.pop(head)
        del self.waiting[head]

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(list(self.waiting)))
        assert self.queue.remove(one)
        assert not self.queue.remove(one)
        del self.waiting[one]

    @rule(seconds=st.floats(0, 5))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        for one in self.queue.take_expired(self.now_s):
            assert one.deadline_s <= self.now_s
            del self.waiting[one]

    @invariant()
    def agrees(self) -> None:
        assert list(self.queue) == list(self.waiting)
        assert len(self.queue) == len(self.waiting)
        assert self.queue.work == sum(one.work for one in self.waiting)
        assert self.queue.next_deadline_s() == min((one.deadline_s for one in self.waiting), default=math.inf)
        assert all(one.is_waiting for one in self.waiting)
        for priority in Priority:
            assert self.queue.num_waiting(priority) == sum(one.priority is priority for one in self.waiting)


TestQueue = Queue.TestCase


def test_nothing_is_known_of_a_rate_that_was_never_seen() -> None:
    rate = ServiceRate()
    rate.mark(True, 0.0)
    rate.mark(True, 5.0)
    assert rate.wait_s(1.0, 1.0) is None
    assert rate.service_s(100) == 0


def test_the_wait_is_guessed_from_one_answer_and_then_measured() -> None:
    rate = ServiceRate()
    rate.finish(0.1, residence_s=2.0, num_output=100)
    assert rate.wait_s(1.0, 1.0) == pytest.approx(2.0)
    assert rate.service_s(50) == pytest.approx(1.0)
    assert rate.service_s(5000) == pytest.approx(2.0)  # never more than the mean
    assert rate.wait_s(1.0, 0.5) == pytest.approx(4.0)  # half of the capacity is what engines get to
    assert rate.wait_s(1.0, 0.0) is None
    rate.mark(True, 0.0)
    for i in range(1, 2001):  # a tenth of the capacity every 0.1 s: all of it in a second
        rate.mark(True, i * 0.1)
        rate.finish(0.1, residence_s=2.0, num_output=100)
    assert rate.wait_s(1.0, 1.0) == pytest.approx(1.0, rel=0.15)
    measured = rate.wait_s(1.0, 1.0)
    rate.mark(False, 200.0)
    rate.mark(True, 900.0)  # nobody waited meanwhile: that says nothing
    assert rate.wait_s(1.0, 1.0) == measured


@given(st.none() | st.floats(0, 1e9))
def test_what_a_client_is_told_to_wait_is_sane(wait_s: float | None) -> None:
    assert 1 <= retry_after_s(wait_s) <= 60


def test_a_deadline_that_cannot_be_met_is_refused() -> None:
    check_deadline(None, 100.0, 1.0)
    check_deadline(1.0, 1.0, 3.1)
    for wait_s, service_s, remaining_s in ((1.0, 1.0, 2.9), (None, 0.0, 0.0), (None, 0.0, -1.0)):
        with pytest.raises(OverloadedError) as refused:
            check_deadline(wait_s, service_s, remaining_s)
        assert refused.value.code == "deadline_unmeetable"
        assert "retry-after" in refused.value.headers
