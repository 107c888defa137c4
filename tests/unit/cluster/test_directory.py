from __future__ import annotations

import dataclasses

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from serving.cluster.directory import EMPTY, Directory, ReplicaRecord, ReplicaState, Snapshot

LEASE_S = 10.0
START_LEASE_S = 900.0
READY = ReplicaRecord("a", "nano", "http://127.0.0.1:1", ReplicaState.READY, max_num_seqs=4, max_model_len=64)


def build_directory(life: int = 1) -> Directory:
    return Directory(lease_s=LEASE_S, start_lease_s=START_LEASE_S, life=life)


def test_a_new_directory_is_empty_and_no_reader_takes_it_for_the_one_it_knows() -> None:
    assert build_directory().snapshot == Snapshot(version=(1, 0), records=())
    assert build_directory().snapshot.version != EMPTY.version


def test_two_lives_never_have_the_same_version() -> None:
    first, second = build_directory(life=1), build_directory(life=2)
    for directory in (first, second):
        directory.put(READY, 0.0)
    assert first.snapshot.records == second.snapshot.records
    assert first.snapshot.version != second.snapshot.version


def test_only_a_change_changes_the_version() -> None:
    directory = build_directory()
    assert directory.put(READY, 0.0) is True
    version = directory.snapshot.version
    assert directory.put(READY, 1.0) is False
    assert directory.snapshot.version == version
    assert directory.put(dataclasses.replace(READY, state=ReplicaState.DRAINING), 2.0) is True
    assert directory.snapshot.version > version


def test_a_goodbye_takes_the_replica_out_once() -> None:
    directory = build_directory()
    directory.put(READY, 0.0)
    assert directory.remove("a") is True
    version = directory.snapshot.version
    assert directory.remove("a") is False
    assert directory.snapshot == Snapshot(version=version)


@pytest.mark.parametrize(
    ("state", "lease_s"),
    [
        (ReplicaState.STARTING, START_LEASE_S),
        (ReplicaState.READY, LEASE_S),
        (ReplicaState.DRAINING, LEASE_S),
    ],
)
def test_a_replica_is_dropped_when_its_lease_is_over_and_not_before(state: ReplicaState, lease_s: float) -> None:
    directory = build_directory()
    directory.put(dataclasses.replace(READY, state=state), 100.0)
    assert directory.expire(100.0 + lease_s) is False
    assert len(directory.snapshot.records) == 1
    assert directory.expire(100.0 + lease_s + 0.001) is True
    assert directory.snapshot.records == ()


def test_repeating_the_same_word_renews_the_lease() -> None:
    directory = build_directory()
    directory.put(READY, 0.0)
    directory.put(READY, 9.0)
    assert directory.expire(15.0) is False


def test_becoming_ready_shortens_the_lease() -> None:
    directory = build_directory()
    directory.put(dataclasses.replace(READY, state=ReplicaState.STARTING), 0.0)
    directory.put(READY, 1.0)
    assert directory.expire(12.0) is True


def test_a_dropped_replica_that_speaks_again_is_listed_again() -> None:
    directory = build_directory()
    directory.put(READY, 0.0)
    directory.expire(100.0)
    assert directory.put(READY, 101.0) is True
    assert directory.snapshot.records == (READY,)


def test_ready_names_the_ready_replicas_of_one_model() -> None:
    records = tuple(
        dataclasses.replace(READY, replica_id=f"{model}-{state}", model=model, state=state)
        for model in ("nano", "other")
        for state in ReplicaState
    )
    snapshot = Snapshot((1, 1), records)
    assert [record.replica_id for record in snapshot.ready("nano")] == ["nano-ready"]
    assert snapshot.ready("unknown") == ()


class DirectoryMachine(RuleBasedStateMachine):
    """The directory against the plainest model of it: who said what, and when."""

    ids = st.sampled_from("abc")

    @initialize()
    def begin(self) -> None:
        self.directory = build_directory()
        self.said: dict[str, tuple[ReplicaRecord, float]] = {}
        self.now_s = 0.0
        self.last = self.directory.snapshot

    def step(self, has_changed: bool) -> None:
        """A change is told exactly when the list differs, and only then does the version grow."""
        snapshot = self.directory.snapshot
        assert has_changed == (snapshot.records != self.last.records)
        if has_changed:
            assert snapshot.version > self.last.version
        else:
            assert snapshot.version == self.last.version
        self.last = snapshot

    @rule(replica_id=ids, state=st.sampled_from(ReplicaState), stage=st.sampled_from(["", "loading"]))
    def put(self, replica_id: str, state: ReplicaState, stage: str) -> None:
        record = dataclasses.replace(READY, replica_id=replica_id, state=state, stage=stage)
        self.said[replica_id] = (record, self.now_s)
        self.step(self.directory.put(record, self.now_s))

    @rule(replica_id=ids)
    def remove(self, replica_id: str) -> None:
        self.said.pop(replica_id, None)
        self.step(self.directory.remove(replica_id))

    @rule(passed_s=st.sampled_from([0.0, 1.0, 5.0, LEASE_S, LEASE_S + 1, START_LEASE_S + 1]))
    def expire(self, passed_s: float) -> None:
        self.now_s += passed_s
        self.said = {
            replica_id: (record, said_s)
            for replica_id, (record, said_s) in self.said.items()
            if self.now_s - said_s <= (START_LEASE_S if record.state is ReplicaState.STARTING else LEASE_S)
        }
        self.step(self.directory.expire(self.now_s))

    @invariant()
    def lists_who_spoke_in_order(self) -> None:
        if hasattr(self, "directory"):
            expected = [record for _, (record, _) in sorted(self.said.items())]
            assert list(self.directory.snapshot.records) == expected


TestDirectoryAgainstItsModel = DirectoryMachine.TestCase


def test_a_start_that_failed_is_told_until_the_next_one() -> None:
    directory = Directory(lease_s=1, start_lease_s=1, life=1)
    before = directory.snapshot.version
    directory.fail("m", "a shape that does not fit")
    assert directory.snapshot.failures == (("m", "a shape that does not fit"),)
    assert directory.snapshot.version > before
    known = directory.snapshot.version
    directory.begin_start()
    assert directory.snapshot.failures == ()
    assert directory.snapshot.version > known
    known = directory.snapshot.version
    directory.begin_start()
    assert directory.snapshot.version == known


def test_a_stop_is_told_until_the_next_start() -> None:
    directory = Directory(lease_s=1, start_lease_s=1, life=1)
    before = directory.snapshot.version
    directory.begin_stop()
    assert directory.snapshot.is_stopping
    assert directory.snapshot.version > before
    directory.begin_start()
    assert not directory.snapshot.is_stopping
