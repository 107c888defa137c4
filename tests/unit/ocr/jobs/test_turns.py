"""Which job is read next, and which gives its place up: for any tenants, jobs and places."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from serving.ocr.jobs.turns import HeldJob, JobTurns, OwnerJobs


class Places:
    """A service's places as the runner fills them, over jobs that never end."""

    def __init__(self, num_places: int, jobs: dict[str, int]) -> None:
        self.num_places = num_places
        self.jobs = jobs
        self.turns = JobTurns(60.0)
        self.held: list[HeldJob] = []
        self.now_s = 0.0
        self._num_made = 0

    @property
    def running(self) -> Counter[str]:
        return Counter(job.owner for job in self.held)

    def survey(self) -> list[OwnerJobs]:
        running = self.running
        return [OwnerJobs(owner, running[owner], number - running[owner], 1) for owner, number in self.jobs.items()]

    def fill(self) -> None:
        while len(self.held) < self.num_places and (waiting := self.turns.rank(self.survey())):
            owner = waiting[0].owner
            self.turns.note(owner, self.now_s)
            self._num_made += 1
            self.held.append(HeldJob(str(self._num_made), owner, self.now_s))
            self.now_s += 0.001

    def look(self) -> int:
        """Once as the runner does it: fill, choose who leaves, and let those leave. How many have left."""
        self.fill()
        if len(self.held) < self.num_places:
            return 0
        leaving = self.turns.choose_leaving(self.held, self.survey(), self.now_s)
        self.held = [job for job in self.held if job.job_id not in leaving]
        self.fill()
        return len(leaving)


JOBS = st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 100), min_size=1)


@given(num_places=st.integers(1, 6), first=st.integers(1, 100), others=JOBS)
def test_who_came_first_does_not_keep_all_places(num_places: int, first: int, others: dict[str, int]) -> None:
    places = Places(num_places, {"hostile": first})
    places.fill()
    assert places.running == {"hostile": min(first, num_places)}
    places.jobs |= others
    places.look()
    assert places.look() == 0, "one look is enough, and nothing goes to and fro"
    running = places.running
    assert sum(running.values()) == min(num_places, first + sum(others.values()))
    for each in places.survey():
        if each.num_free:
            assert max(running.values()) - each.num_running <= 1


@given(num_places=st.integers(1, 4), jobs=JOBS)
def test_everybody_has_a_turn_in_bounded_time(num_places: int, jobs: dict[str, int]) -> None:
    places = Places(num_places, {"hostile": 100} | jobs)
    unseen: Counter[str] = Counter()
    for _ in range(30):
        places.look()
        for owner in places.jobs:
            unseen[owner] = 0 if places.running[owner] else unseen[owner] + 1
        assert max(unseen.values()) < len(places.jobs)
        places.now_s += 60.0


def test_a_job_gets_on_before_it_leaves() -> None:
    turns = JobTurns(60.0)
    tenants = [OwnerJobs("hostile", 2, 9, 1), OwnerJobs("other", 0, 1, 2)]
    held = [HeldJob("1", "hostile", 0.0, can_leave=False), HeldJob("2", "hostile", 1.0, can_leave=False)]
    assert turns.choose_leaving(held, tenants, 1000.0) == []
    held[1] = replace(held[1], can_leave=True)
    assert turns.choose_leaving(held, tenants, 1000.0) == ["2"]
    held[1] = replace(held[1], is_leaving=True)
    assert turns.choose_leaving([replace(held[0], can_leave=True), held[1]], tenants, 1000.0) == []


def test_nobody_leaves_for_the_same_tenant_or_for_nobody() -> None:
    turns = JobTurns(60.0)
    held = [HeldJob("1", "a", 0.0), HeldJob("2", "a", 0.0)]
    assert turns.choose_leaving(held, [OwnerJobs("a", 2, 50, 1)], 1e6) == []
    # The other has as many running, elsewhere.
    assert turns.choose_leaving(held[:1], [OwnerJobs("a", 1, 0, 1), OwnerJobs("b", 1, 5, 1)], 1e6) == []
