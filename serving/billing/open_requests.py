"""Requests that replicas have right now, on the local disk: what a killed router leaves unfinished.

A record is written when a request has ended, which a killed router does not live to see, although engines have worked
for it. So every request has a place in this file from before it is sent to a replica until its record is in the
journal. The router that adopts the journal asks the replicas about the remaining requests, and writes their records.
Places are reused: the file grows with the requests in flight, not with their total. Its content survives the death of
the process, but not a loss of power.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from pathlib import Path

import msgspec

from serving.billing.records import LostTry, Outcome, RequestRecord, TokenCounts

ERROR_CODE = "router_lost"
_PLACE_BYTES = 2048
_HEAD = struct.Struct("<II")  # the payload's length, 0 for an empty place, and its CRC-32
_EMPTY = bytes(_HEAD.size)
_LOST_STATUS = 502


class OpenRequest(msgspec.Struct, array_like=True, frozen=True):
    """What the record of an unfinished request is made from."""

    request_id: str
    tenant_id: str
    key_id: str
    model: str
    route: str
    price_version: str
    router_id: str
    arrived_ns: int
    num_pages: int
    priority: str
    is_stream: bool
    num_tries: int
    replica_ids: tuple[str, ...]
    """Replicas that may have counted something for it; the last one has it now."""
    promised: RequestRecord | None = None
    """Its record, if a whole answer was about to be sent while `replica_ids` had still to be asked about earlier
    tries."""


FetchCounts = Callable[[str, str], Awaitable[TokenCounts | None]]
"""Fetches what a replica (by id) counted for a request id; None if it cannot say."""

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(OpenRequest).decode


class OpenRequests:
    """The file of one writer, created with the first request. `read` is for the router that has adopted it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1
        self._places: dict[str, int] = {}
        self._free: list[int] = []
        self._num_places = 0
        self.has_left_over = path.exists() and bool(read_open_requests(path))
        """Whether another writer has left requests in it."""

    def __len__(self) -> int:
        return len(self._places)

    def put(self, request: OpenRequest) -> None:
        """Add a request that a replica gets next. If it is here already, it gets its new place before it loses the old
        one.

        Raises:
            OSError: the disk refuses the write.
            ValueError: it does not fit into a place.
        """
        payload = _encode(request)
        if len(payload) > _PLACE_BYTES - _HEAD.size:
            raise ValueError(f"a request of {len(payload)} bytes")
        if self._fd < 0:
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        place = self._free.pop() if self._free else self._num_places
        self._num_places = max(self._num_places, place + 1)
        before = self._places.get(request.request_id)
        text = _HEAD.pack(len(payload), zlib.crc32(payload)) + payload
        if os.pwrite(self._fd, text, place * _PLACE_BYTES) != len(text):
            os.pwrite(self._fd, _EMPTY, place * _PLACE_BYTES)
            self._free.append(place)
            raise OSError(f"{self._path}: no room")
        self._places[request.request_id] = place
        if before is not None:
            self._clear(before)

    def remove(self, request_id: str) -> None:
        """Remove a request whose record is written. Unknown ids are ignored."""
        place = self._places.pop(request_id, None)
        if place is not None:
            self._clear(place)

    def close(self) -> None:
        """Close the file; an empty one is deleted."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if not self._places and not self.has_left_over:
            self._path.unlink(missing_ok=True)

    def forget(self) -> None:
        """The requests that were left over have their records now."""
        self.has_left_over = False
        self._path.unlink(missing_ok=True)

    def read(self) -> list[OpenRequest]:
        return read_open_requests(self._path)

    def _clear(self, place: int) -> None:
        os.pwrite(self._fd, _EMPTY, place * _PLACE_BYTES)
        self._free.append(place)


def read_open_requests(path: Path) -> list[OpenRequest]:
    """Every request in a file, each once, in its latest state; none if the file does not exist.

    A place that its writer did not live to finish belongs to a request that was not sent.
    """
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return []
    found: dict[str, OpenRequest] = {}
    for begin in range(0, len(text) - _HEAD.size, _PLACE_BYTES):
        length, checksum = _HEAD.unpack_from(text, begin)
        payload = text[begin + _HEAD.size : begin + _HEAD.size + length]
        if not length or len(payload) != length or zlib.crc32(payload) != checksum:
            continue
        try:
            request = _decode(payload)
        except msgspec.MsgspecError:  # of a version with different requests
            continue
        known = found.get(request.request_id)
        if known is None or request.num_tries > known.num_tries or request.promised is not None:
            found[request.request_id] = request
    return list(found.values())


async def close_request(request: OpenRequest, fetch_counts: FetchCounts, ended_ns: int) -> RequestRecord:
    """The record of a request whose router has died: it failed, so it is free; the replicas report its tokens.

    A request whose answer may have been sent keeps its promised record, plus what earlier tries have used.
    """
    if request.promised is not None:
        lost = await _count_lost_tries(request, request.replica_ids, fetch_counts)
        wasted = request.promised.num_wasted_tokens + sum(each.num_completion_tokens for each in lost)
        return replace(request.promised, num_wasted_tokens=wasted, lost_tries=tuple(lost))
    *earlier, last = request.replica_ids
    counted = await fetch_counts(last, request.request_id)
    lost = await _count_lost_tries(request, earlier, fetch_counts)
    tokens = counted or TokenCounts()
    return RequestRecord(
        request_id=request.request_id,
        tenant_id=request.tenant_id,
        key_id=request.key_id,
        model=request.model,
        route=request.route,
        outcome=Outcome.FAILED,
        status=_LOST_STATUS,
        error_code=ERROR_CODE,
        num_pages=request.num_pages,
        tokens=tokens,
        is_estimated=counted is None,
        num_wasted_tokens=tokens.num_completion_tokens + sum(each.num_completion_tokens for each in lost),
        price_version=request.price_version,
        replica_id=last,
        num_tries=request.num_tries,
        arrived_ns=request.arrived_ns,
        ended_ns=ended_ns,
        priority=request.priority,
        is_stream=request.is_stream,
        router_id=request.router_id,
        lost_tries=tuple(lost),
    )


async def _count_lost_tries(
    request: OpenRequest, replica_ids: Iterable[str], fetch_counts: FetchCounts
) -> list[LostTry]:
    """What was counted for tries that did not answer, if known."""
    lost = []
    for replica_id in replica_ids:
        counts = await fetch_counts(replica_id, request.request_id)
        if counts is not None:
            lost.append(LostTry(replica_id, counts.num_prompt_tokens, counts.num_completion_tokens))
    return lost
