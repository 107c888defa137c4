"""The format of journals: records in consecutive frames with length and checksum. Pure.

    magic (4 bytes)  length of the payload (4)  CRC-32 of the payload (4)  payload: the record in MessagePack, by names

A writer that dies leaves at most one torn frame, at the end. The magic lets a reader find the next whole frame after
bytes that a disk has lost, so that damage affects no other records. Fields unknown to a version of the stack are
ignored, missing ones take their defaults.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field
from typing import Any

import msgspec

from serving.billing.records import RequestRecord

MAGIC = b"\xa5LR\x01"
MAX_PAYLOAD_BYTES = 2**18
_HEAD = struct.Struct("<4sII")
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(RequestRecord).decode


@dataclass(slots=True)
class Frames:
    """The result of decoding a piece of a journal."""

    records: list[RequestRecord] = field(default_factory=list)
    size_bytes: int = 0
    """How much of the piece was decoded; what follows is the beginning of a frame."""
    damaged_bytes: int = 0
    """Skipped, since they were not frames."""
    torn_bytes: int = 0
    """At the very end: the beginning of a frame that its writer did not live to finish."""


def encode_frame(record: RequestRecord) -> bytes:
    """Encode a record as a frame.

    Raises:
        ValueError: it cannot be written: text that is not valid UTF-8, a number of more than 64 bits, or too large a
            record.
    """
    try:
        payload = _encode(record)
    except OverflowError as error:
        raise ValueError(str(error)) from error
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise ValueError(f"a record of {len(payload)} bytes")
    return _HEAD.pack(MAGIC, len(payload), zlib.crc32(payload)) + payload


def clean_record(record: RequestRecord) -> RequestRecord:
    """The record with everything replaced that no journal or database accepts: zero bytes, lone surrogates, numbers
    beyond 64 bits."""
    cleaned: RequestRecord = msgspec.convert(_clean(msgspec.to_builtins(record)), RequestRecord)
    return cleaned


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode().replace("\0", "?")
    if isinstance(value, int) and not isinstance(value, bool):
        return max(-(2**63), min(value, 2**63 - 1))
    if isinstance(value, dict):
        return {name: _clean(part) for name, part in value.items()}
    return [_clean(part) for part in value] if isinstance(value, (list, tuple)) else value


def decode_frames(piece: bytes, *, limit: int, is_end: bool) -> Frames:
    """Decode at most `limit` records from the beginning of a piece.

    `is_end` means that nothing will follow, so an incomplete frame is damage. Otherwise it is left, to be read again
    together with what follows.
    """
    found = Frames()
    view = memoryview(piece)
    while len(found.records) < limit and found.size_bytes < len(piece):
        record, size = _read_frame(view[found.size_bytes :])
        if record is not None:
            found.records.append(record)
            found.size_bytes += size
        elif size and not is_end:
            break
        else:
            following = piece.find(MAGIC, found.size_bytes + 1)
            if following < 0 and size:
                found.torn_bytes = len(piece) - found.size_bytes
                found.size_bytes = len(piece)
                break
            if following < 0:
                # The last bytes may be the beginning of a magic.
                following = len(piece) if is_end else max(found.size_bytes + 1, len(piece) - len(MAGIC) + 1)
            found.damaged_bytes += following - found.size_bytes
            found.size_bytes = following
    return found


def _read_frame(view: memoryview) -> tuple[RequestRecord | None, int]:
    """The record and its size; None and 1 if more bytes could complete it; None and 0 if it is not a frame."""
    if len(view) < _HEAD.size:
        return None, int(MAGIC.startswith(bytes(view[: len(MAGIC)])))
    magic, length, checksum = _HEAD.unpack_from(view)
    if magic != MAGIC or length > MAX_PAYLOAD_BYTES:
        return None, 0
    end = _HEAD.size + length
    if len(view) < end:
        return None, 1
    payload = view[_HEAD.size : end]
    if zlib.crc32(payload) != checksum:
        return None, 0
    try:
        return _decode(payload), end
    except msgspec.MsgspecError:  # complete, but of a version with different records
        return None, 0
