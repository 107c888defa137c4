"""Which replica gets a request. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from serving.directory import ReplicaRecord


def choose_replica(
    ready: Sequence[ReplicaRecord], outstanding: Mapping[str, int], tried: Collection[str], turn: int
) -> ReplicaRecord | None:
    """The ready replica with the fewest requests of this router under way, relative to what it runs at once.

    Args:
        ready: replicas that may get the request.
        outstanding: requests that this router has under way, by replica id.
        tried: replicas that have failed this request already.
        turn: any running number; equals are taken in turn by it.

    Returns:
        None when every ready replica was tried, or there is none.
    """
    candidates = [record for record in ready if record.replica_id not in tried]
    if not candidates:
        return None
    start = turn % len(candidates)
    in_turn = [*candidates[start:], *candidates[:start]]
    return min(in_turn, key=lambda record: outstanding.get(record.replica_id, 0) / max(1, record.max_num_seqs))
