"""Which replica gets a request: the one with the least outstanding work for its size. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from random import Random

from serving.cluster.directory import ReplicaRecord, ReplicaState, RouterReport, Snapshot

MANY = 8
"""Among more replicas than this, routers that are several compare only two, drawn at random (power of two choices:
Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", IEEE TPDS 2001). If all of them took the emptiest
by the same reports, they would herd on it until they hear of each other again; two draws come close to the true least
without that."""
MANY_ALONE = 64
"""The same for a router that is alone. It cannot herd, and its books are exact, so it compares all while that costs
little."""
_ASSUMED_TOKENS_PER_SEQ = 1024  # of a replica that does not tell what its KV cache holds
_WITHOUT_LIMITS = 1 << 62


@dataclass(slots=True)
class ReplicaLoad:
    """One replica and what it has to do, as one router knows it. Work is in tokens."""

    record: ReplicaRecord
    capacity: int = 1
    """Work that it may have under way."""
    common_capacity: int = 1
    """The part of it that every priority class may fill."""
    num_places: int = _WITHOUT_LIMITS
    """Sequences that its engine runs at once."""
    max_seqs: int = _WITHOUT_LIMITS
    """Sequences that it may have under way."""
    common_seqs: int = _WITHOUT_LIMITS
    work: int = 0
    """Under way through this router."""
    num_seqs: int = 0
    """Sequences under way through this router."""
    others_work: int = 0
    """Under way through other routers, when they last told."""
    is_gone: bool = False
    """Whether it has left the list: it is remembered only for what still runs on it."""
    replica_id: str = field(init=False)

    def __post_init__(self) -> None:
        self.replica_id = self.record.replica_id

    def resize(self, record: ReplicaRecord, work_per_replica: int | None, high_reserve: float) -> None:
        """Take over what a replica says of itself, under the settings of the same names.

        More sequences than the engine runs at once are let in, an eighth but one at least: pages are cut and scaled
        before they reach the engine, and an answer's end takes a way back before the next request sets out; a place
        in the engine would be empty for so long. The KV cache needs no such margin, since work counts whole answers
        from their start and so is counted high.
        """
        self.record = record
        reported = record.capacity_tokens or max(1, record.max_num_seqs) * _ASSUMED_TOKENS_PER_SEQ
        self.capacity = work_per_replica or reported
        self.common_capacity = max(1, int(self.capacity * (1 - high_reserve)))
        most = record.max_num_seqs
        self.num_places = most if most > 0 else _WITHOUT_LIMITS
        self.max_seqs = most + max(1, most // 8) if most > 0 else _WITHOUT_LIMITS
        self.common_seqs = self.max_seqs - int(most * high_reserve)

    @property
    def burden(self) -> float:
        """Outstanding work relative to capacity: 0 is idle, from 1 on a request waits inside the engine.

        Of the two things that an engine can run out of, room in its KV cache and places for sequences, the one that is
        nearer: many small requests fill the places while the cache looks empty. What others have under way is known as
        work only.
        """
        by_work = (self.work + self.others_work) / self.capacity
        by_seqs = self.num_seqs / self.num_places
        return by_work if by_work > by_seqs else by_seqs

    def has_room(self, need: Need) -> bool:
        """Whether a request may start here now.

        One through which nothing of this router runs always has room: only so can a request run that is larger than
        the whole capacity. And with several routers each may fill its equal share, whatever the others report, for
        one that was first would else keep the replica for itself by refilling before they hear of a free place.
        """
        if not self.num_seqs:
            return True
        limit, seqs = (self.capacity, self.max_seqs) if need.is_high else (self.common_capacity, self.common_seqs)
        if self.num_seqs + need.num_seqs > seqs:
            return False
        work = self.work + need.work
        return work + self.others_work <= limit or work * need.num_routers <= limit

    def add(self, work: int, num_seqs: int) -> None:
        """A request starts here (or, with negative numbers, has left)."""
        self.work += work
        self.num_seqs += num_seqs


@dataclass(slots=True)
class Need:
    """What a request needs of a replica."""

    work: int
    """Tokens."""
    num_seqs: int = 1
    is_high: bool = False
    """Whether it may fill what is kept for the high priority class."""
    num_routers: int = 1
    """Routers that share the replicas, this one included."""


@dataclass(slots=True)
class Fleet:
    """All replicas that are listed or still run something, under the settings of the same names."""

    work_per_replica: int | None
    high_reserve: float
    num_routers: int = 1
    """That share the replicas, this one included."""
    _loads: dict[str, ReplicaLoad] = field(default_factory=dict)
    _others_work: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._loads)

    def follow(self, snapshot: Snapshot) -> dict[str, list[ReplicaLoad]]:
        """Take over a replica list; gives the replicas that are ready, by model. One that has left is remembered until
        nothing runs on it any more, so that it is not taken for idle should it come back."""
        listed = {record.replica_id for record in snapshot.records}
        for replica_id, load in list(self._loads.items()):
            load.is_gone = replica_id not in listed
            self.forget(load)
        ready: dict[str, list[ReplicaLoad]] = {}
        for record in snapshot.records:
            load = self._loads.setdefault(record.replica_id, ReplicaLoad(record))
            load.resize(record, self.work_per_replica, self.high_reserve)
            load.others_work = self._others_work.get(record.replica_id, 0)
            if record.state is ReplicaState.READY:
                ready.setdefault(record.model, []).append(load)
        return ready

    def absorb(self, others: Sequence[RouterReport]) -> None:
        """Take in what the other routers have under way: all of their last reports, every time."""
        self.num_routers = 1 + len(others)
        self._others_work = {}
        for report in others:
            for replica_id, work in report.replica_work:
                self._others_work[replica_id] = self._others_work.get(replica_id, 0) + work
        for replica_id, load in self._loads.items():
            load.others_work = self._others_work.get(replica_id, 0)

    def forget(self, load: ReplicaLoad) -> None:
        """Drop a replica if it has left and nothing runs on it."""
        if load.is_gone and not load.num_seqs:
            self._loads.pop(load.replica_id, None)

    def work(self) -> dict[str, int]:
        """Under way through this router, in tokens by replica id; replicas without any are left out."""
        return {replica_id: load.work for replica_id, load in self._loads.items() if load.num_seqs}


def choose(
    loads: Sequence[ReplicaLoad], need: Need | None, excluded: Collection[str], rng: Random
) -> ReplicaLoad | None:
    """The replica with the smallest burden; between equals each is as likely.

    Args:
        loads: the replicas that are ready for the model: none that starts or drains.
        need: only replicas with room for it are taken; None takes any.
        excluded: ids of replicas that failed this request already, or that a circuit breaker holds back.
        rng: where chance comes from.

    Returns:
        None when no replica is left. Two draws that hit only busy or excluded replicas are not the last word: then all
        are looked at, so that nothing waits in a queue or inside an engine while there is room.
    """
    is_alone = need is not None and need.num_routers == 1
    if len(loads) > (MANY_ALONE if is_alone else MANY):
        first = int(rng.random() * len(loads))
        second = int(rng.random() * (len(loads) - 1))
        drawn = _least((loads[first], loads[second + (second >= first)]), need, excluded, rng)
        if drawn is not None and drawn.burden < 1:
            return drawn
    return _least(loads, need, excluded, rng)


def _least(
    loads: Sequence[ReplicaLoad], need: Need | None, excluded: Collection[str], rng: Random
) -> ReplicaLoad | None:
    best: ReplicaLoad | None = None
    least = 0.0
    num_equal = 0
    for load in loads:
        if (excluded and load.replica_id in excluded) or (need is not None and not load.has_room(need)):
            continue
        burden = load.burden
        if best is None or burden < least:
            best, least, num_equal = load, burden, 1
        elif burden == least:
            num_equal += 1
            if rng.random() * num_equal < 1:  # reservoir sampling: the k-th equal is taken with probability 1/k
                best = load
    return best
