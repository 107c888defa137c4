from __future__ import annotations

import dataclasses
from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.cluster.directory import ReplicaRecord, ReplicaState, RouterReport, Snapshot
from serving.router.scheduling.balance import MANY, Fleet, Need, ReplicaLoad, choose


def replica(replica_id: str, max_num_seqs: int = 4, state: ReplicaState = ReplicaState.READY) -> ReplicaRecord:
    return ReplicaRecord(replica_id, "nano", f"http://{replica_id}", state, max_num_seqs=max_num_seqs)


def load(name: str, work: int = 0, num_seqs: int | None = None, capacity: int = 1000, others: int = 0) -> ReplicaLoad:
    one = ReplicaLoad(
        replica(name), work=work, num_seqs=int(work > 0) if num_seqs is None else num_seqs, others_work=others
    )
    one.capacity = one.common_capacity = capacity
    return one


LOAD_LISTS = st.lists(
    st.builds(load, st.uuids().map(str), st.integers(0, 2000), st.none(), st.integers(1, 2000), st.integers(0, 2000)),
    max_size=24,
)
NEEDS = st.none() | st.builds(Need, st.integers(1, 3000), st.integers(1, 20), st.booleans(), st.integers(1, 5))


@given(LOAD_LISTS, NEEDS, st.sets(st.integers(0, 23)), st.randoms(use_true_random=False))
def test_the_choice_has_room_and_is_not_excluded(
    loads: list[ReplicaLoad], need: Need | None, out: set[int], rng: Random
) -> None:
    excluded = {one.replica_id for i, one in enumerate(loads) if i in out}
    usable = [one for one in loads if one.replica_id not in excluded and (need is None or one.has_room(need))]
    chosen = choose(loads, need, excluded, rng)
    if chosen is None:
        assert not usable
        return
    assert chosen in usable
    if len(loads) <= MANY or (need is not None and need.num_routers == 1):
        assert chosen.burden == min(one.burden for one in usable)


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 10), st.integers(1, 10), st.booleans())
def test_nothing_goes_over_the_capacity_but_what_is_alone(
    under_way: int, work: int, num_seqs: int, more_seqs: int, is_high: bool
) -> None:
    one = ReplicaLoad(replica("a"))
    one.resize(replica("a", 16), 4000, 0.25)
    one.add(under_way, num_seqs)
    limit, seqs = (4000, 18) if is_high else (3000, 14)
    fits = under_way + work <= limit and num_seqs + more_seqs <= seqs
    assert one.has_room(Need(work, more_seqs, is_high)) == fits
    one.add(-under_way, -num_seqs)
    assert one.has_room(Need(work, more_seqs, is_high))


@pytest.mark.parametrize(
    ("record", "work_per_replica", "capacity", "max_seqs"),
    [
        (replica("a", 0), None, 1024, 1 << 62),
        (replica("a", 4), None, 4096, 5),
        (replica("a", 64), None, 65_536, 72),
        (replica("a", 64), 500, 500, 72),
        (dataclasses.replace(replica("a", 64), capacity_tokens=9000), None, 9000, 72),
    ],
)
def test_capacity_is_what_is_set_or_told_or_guessed(
    record: ReplicaRecord, work_per_replica: int | None, capacity: int, max_seqs: int
) -> None:
    one = ReplicaLoad(record)
    one.resize(record, work_per_replica, 0.0)
    assert (one.capacity, one.common_capacity, one.max_seqs, one.common_seqs) == (
        capacity,
        capacity,
        max_seqs,
        max_seqs,
    )


def test_nobody_is_chosen_from_nobody_or_when_all_were_tried() -> None:
    assert choose([], None, (), Random(1)) is None
    assert choose([load("a")], Need(1), ("a",), Random(1)) is None


def test_equals_are_chosen_equally_often() -> None:
    rng = Random(1)
    for num_replicas in (4, 20):
        loads = [load(f"r{i}") for i in range(num_replicas)]
        counts = Counter(choose(loads, None, (), rng).replica_id for _ in range(num_replicas * 500))  # type: ignore[union-attr]
        assert len(counts) == num_replicas
        assert all(400 < count < 600 for count in counts.values())


def test_among_many_two_are_compared() -> None:
    rng = Random(1)
    loads = [load(f"r{i}", work=i * 10) for i in range(64)]
    need = Need(10, num_routers=2)
    counts = Counter(choose(loads, need, (), rng).replica_id for _ in range(6400))  # type: ignore[union-attr]
    assert counts["r0"] < 400  # two in 64, where the least of all would get everything
    assert counts["r63"] == 0
    assert choose(loads, Need(10), (), rng) is loads[0]  # who is alone cannot herd


def test_one_with_room_among_many_is_always_found() -> None:
    rng = Random(1)
    loads = [load(f"r{i}", work=1000) for i in range(64)]
    loads[40] = load("free", work=10)
    for _ in range(100):
        assert choose(loads, Need(10, num_routers=2), (), rng) is loads[40]


def test_two_routers_with_the_same_news_spread() -> None:
    """Power of two choices: what each does between reports does not pile up on the replica that looked emptiest."""
    loads = [load(f"r{i}", capacity=100_000, others=1000 * i) for i in range(32)]
    for _ in range(500):
        chosen = choose(loads, None, (), Random(_))
        assert chosen is not None
        chosen.add(100, 1)
    assert max(one.work for one in loads) < 500 * 100 / 4


def test_what_is_nearer_to_its_end_decides() -> None:
    """Many small requests fill an engine's places while its cache looks empty."""
    full, roomy = load("full", work=100, num_seqs=32), load("roomy", work=500, num_seqs=2)
    for one in (full, roomy):
        one.num_places = 32
    assert choose([full, roomy], None, (), Random(1)) is roomy
    assert (full.burden, roomy.burden) == (1.0, 0.5)


def test_a_fleet_knows_others_work_before_the_replica_is_listed() -> None:
    fleet = Fleet(None, 0.0)
    fleet.absorb([RouterReport("x", replica_work=(("a", 70), ("b", 5))), RouterReport("y", replica_work=(("a", 30),))])
    assert fleet.num_routers == 3
    draining = replica("b", state=ReplicaState.DRAINING)
    ready = fleet.follow(Snapshot((1, 1), (replica("a"), draining)))
    assert [one.replica_id for one in ready["nano"]] == ["a"]
    assert ready["nano"][0].others_work == 100
    ready["nano"][0].add(10, 1)
    assert fleet.follow(Snapshot((1, 2), ())) == {}
    assert fleet.work() == {"a": 10}
    ready["nano"][0].add(-10, -1)
    fleet.forget(ready["nano"][0])
    assert fleet.work() == {}
    assert len(fleet) == 0
