from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from serving.directory import ReplicaRecord, ReplicaState, Snapshot
from serving.router.balance import choose_replica


def replica(replica_id: str, max_num_seqs: int = 4, state: ReplicaState = ReplicaState.READY) -> ReplicaRecord:
    return ReplicaRecord(replica_id, "nano", f"http://{replica_id}", state, max_num_seqs=max_num_seqs)


A, B, C = replica("a"), replica("b"), replica("c")

IDS = [f"r{i}" for i in range(6)]
RECORDS = st.lists(
    st.builds(replica, st.sampled_from(IDS), st.integers(0, 256), st.sampled_from(ReplicaState)),
    unique_by=lambda record: record.replica_id,
    max_size=6,
)
LOADS = st.dictionaries(st.sampled_from(IDS), st.integers(0, 20))
TRIED = st.lists(st.sampled_from(IDS), max_size=4)
TURNS = st.integers(0, 10**6)


def test_nobody_is_chosen_from_nobody() -> None:
    assert choose_replica([], {}, [], 0) is None


def test_nobody_is_chosen_when_everybody_was_tried() -> None:
    assert choose_replica([A, B], {}, ["a", "b"], 0) is None


def test_the_least_busy_is_chosen_whoever_is_in_turn() -> None:
    for turn in range(6):
        assert choose_replica([A, B, C], {"a": 3, "b": 1, "c": 2}, [], turn) is B


def test_busy_means_relative_to_what_a_replica_runs_at_once() -> None:
    large, small = replica("large", max_num_seqs=256), replica("small", max_num_seqs=4)
    for turn in range(4):
        assert choose_replica([large, small], {"large": 100, "small": 2}, [], turn) is large
        assert choose_replica([large, small], {"large": 200, "small": 2}, [], turn) is small


def test_a_replica_that_does_not_tell_its_size_counts_as_one_sequence() -> None:
    unknown = replica("unknown", max_num_seqs=0)
    for turn in range(2):
        assert choose_replica([unknown, A], {"unknown": 1, "a": 3}, [], turn) is A


def test_a_replica_without_requests_counts_as_idle() -> None:
    for turn in range(2):
        assert choose_replica([A, B], {"a": 1}, [], turn) is B


@given(RECORDS, LOADS, TRIED, TURNS)
def test_only_an_untried_ready_replica_is_chosen(
    records: list[ReplicaRecord], loads: dict[str, int], tried: list[str], turn: int
) -> None:
    ready = Snapshot((1, 1), tuple(records)).ready("nano")
    chosen = choose_replica(ready, loads, tried, turn)
    if chosen is None:
        assert all(record.replica_id in tried for record in ready)
        return
    assert chosen.state is ReplicaState.READY
    assert chosen.replica_id not in tried
    burden = loads.get(chosen.replica_id, 0) / max(1, chosen.max_num_seqs)
    for other in ready:
        if other.replica_id not in tried:
            assert burden <= loads.get(other.replica_id, 0) / max(1, other.max_num_seqs)


@given(st.integers(1, 8), st.integers(0, 5), TURNS, st.integers(1, 4))
def test_equals_are_taken_in_turn(num_replicas: int, load: int, first_turn: int, num_rounds: int) -> None:
    ready = [replica(f"r{i}") for i in range(num_replicas)]
    loads = {record.replica_id: load for record in ready}
    turns = range(first_turn, first_turn + num_rounds * num_replicas)
    chosen = Counter(choose_replica(ready, loads, [], turn) for turn in turns)
    assert chosen == Counter(dict.fromkeys(ready, num_rounds))


@given(st.lists(st.integers(1, 32), min_size=1, max_size=5), st.integers(1, 60), TURNS)
def test_work_that_stays_fills_replicas_in_proportion_to_their_size(
    sizes: list[int], num_requests: int, first_turn: int
) -> None:
    ready = [replica(f"r{i}", size) for i, size in enumerate(sizes)]
    loads: Counter[str] = Counter()
    for turn in range(first_turn, first_turn + num_requests):
        chosen = choose_replica(ready, loads, [], turn)
        assert chosen is not None
        loads[chosen.replica_id] += 1
    # Nobody carries more, relative to its size, than another would with one request more.
    for busy in ready:
        for idle in ready:
            before_last = (loads[busy.replica_id] - 1) / busy.max_num_seqs
            assert before_last <= loads[idle.replica_id] / idle.max_num_seqs
