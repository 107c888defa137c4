"""Chooses the replica for a request: the one with the least outstanding work for its size. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from random import Random

from serving.cluster.directory import ReplicaRecord, ReplicaState, RouterReport, Snapshot

MANY = 8
"""With more replicas than this, and several routers, each router compares only two replicas drawn at random (power of
two choices: Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", IEEE TPDS 2001). If all routers
chose the emptiest by the same reports, they would herd on it until the next reports; two draws come close to the true
minimum without that."""
MANY_ALONE = 64
"""The same for a single router. It cannot herd and knows the load exactly, so it compares all replicas while that is
cheap."""
_ASSUMED_TOKENS_PER_SEQ = 1024  # for a replica that does not report the size of its KV cache
_WITHOUT_LIMITS = 1 << 62


@dataclass(slots=True)
class ReplicaLoad:
    """One replica and its load, as one router knows it. Work is in tokens."""

    record: ReplicaRecord
    capacity: int = 1
    """Work that it may have in flight."""
    common_capacity: int = 1
    """The part of it that all priority classes may use."""
    num_places: int = _WITHOUT_LIMITS
    """Sequences that its engine runs concurrently."""
    max_seqs: int = _WITHOUT_LIMITS
    """Sequences that it may have in flight."""
    common_seqs: int = _WITHOUT_LIMITS
    work: int = 0
    """In flight through this router."""
    num_seqs: int = 0
    """Sequences in flight through this router."""
    others_work: int = 0
    """In flight through other routers, as last reported."""
    is_gone: bool = False
    """Whether it is no longer listed: it is remembered only for its requests in flight."""
    replica_id: str = field(init=False)

    def __post_init__(self) -> None:
        self.replica_id = self.record.replica_id

    def resize(self, record: ReplicaRecord, work_per_replica: int | None, high_reserve: float) -> None:
        """Adopt what a replica reports about itself, under the settings of the same names.

        An eighth more sequences than the engine runs concurrently are admitted, at least one more: pages are tiled and
        scaled before they reach the engine, and the end of an answer has to travel back before the next request sets
        out; without the margin a slot in the engine would be idle for that time. The KV cache needs no such margin,
        since work counts whole answers from their start and so errs on the high side.
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
        """Outstanding work relative to capacity: 0 is idle; from 1 on a request queues inside the engine.

        An engine can run out of KV cache or of sequences; the scarcer of the two counts, since many small requests use
        up the sequences while the cache looks empty. Other routers report work only.
        """
        by_work = (self.work + self.others_work) / self.capacity
        by_seqs = self.num_seqs / self.num_places
        return by_work if by_work > by_seqs else by_seqs

    def has_room(self, need: Need) -> bool:
        """Whether a request may start on this replica now.

        A replica without requests of this router always has room: otherwise a request larger than the whole capacity
        could never run. With several routers each may use its equal share, whatever the others report; otherwise the
        router that came first could keep the replica to itself by refilling it before the others learn of a free slot.
        """
        if not self.num_seqs:
            return True
        limit, seqs = (self.capacity, self.max_seqs) if need.is_high else (self.common_capacity, self.common_seqs)
        if self.num_seqs + need.num_seqs > seqs:
            return False
        work = self.work + need.work
        return work + self.others_work <= limit or work * need.num_routers <= limit

    def add(self, work: int, num_seqs: int) -> None:
        """A request starts on this replica or, with negative numbers, has ended."""
        self.work += work
        self.num_seqs += num_seqs


@dataclass(slots=True)
class Need:
    """What a request needs from a replica."""

    work: int
    """Tokens."""
    num_seqs: int = 1
    is_high: bool = False
    """Whether it may use what is reserved for the high priority class."""
    num_routers: int = 1
    """Routers that share the replicas, including this one."""


@dataclass(slots=True)
class Fleet:
    """All replicas that are listed or still have requests in flight, under the settings of the same names."""

    work_per_replica: int | None
    high_reserve: float
    num_routers: int = 1
    """Routers that share the replicas, including this one."""
    _loads: dict[str, ReplicaLoad] = field(default_factory=dict)
    _others_work: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._loads)

    def follow(self, snapshot: Snapshot) -> dict[str, list[ReplicaLoad]]:
        """Adopt a replica list; returns the ready replicas by model. A replica that has left is remembered until its
        last request has ended, so that it is not mistaken for idle if it comes back."""
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
        """Replace what is known of the other routers' work by their latest reports, all of them every time."""
        self.num_routers = 1 + len(others)
        self._others_work = {}
        for report in others:
            for replica_id, work in report.replica_work:
                self._others_work[replica_id] = self._others_work.get(replica_id, 0) + work
        for replica_id, load in self._loads.items():
            load.others_work = self._others_work.get(replica_id, 0)

    def forget(self, load: ReplicaLoad) -> None:
        """Drop a replica that has left and has no requests in flight."""
        if load.is_gone and not load.num_seqs:
            self._loads.pop(load.replica_id, None)

    def work(self) -> dict[str, int]:
        """Work in flight through this router, in tokens by replica id; replicas without any are left out."""
        return {replica_id: load.work for replica_id, load in self._loads.items() if load.num_seqs}


def choose(
    loads: Sequence[ReplicaLoad], need: Need | None, excluded: Collection[str], rng: Random
) -> ReplicaLoad | None:
    """The replica with the smallest burden; ties are broken at random.

    Args:
        loads: the ready replicas of the model, none that is starting or draining.
        need: only replicas with room for it are considered; None considers all.
        excluded: ids of replicas that have failed this request, or that have an open circuit breaker.
        rng: source of randomness.

    Returns:
        None if no replica is left. If both draws hit busy or excluded replicas, all are compared, so that nothing
        queues while there is room.
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
            if rng.random() * num_equal < 1:  # reservoir sampling: the k-th of equals is chosen with probability 1/k
                best = load
    return best
