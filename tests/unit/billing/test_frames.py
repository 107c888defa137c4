from __future__ import annotations

import struct
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.billing_samples import RECORDS, SAMPLE, make_record

from serving.billing.journal_frames import MAGIC, MAX_PAYLOAD_BYTES, clean_record, decode_frames, encode_frame
from serving.billing.records import RequestRecord

FRAMES = [encode_frame(make_record(number)) for number in range(5)]
SIZE = len(FRAMES[0])


def numbers(records: list[RequestRecord]) -> list[int]:
    return [int(record.request_id.removeprefix("req-")) for record in records]


@given(RECORDS)
def test_a_record_comes_back_as_it_was(record: RequestRecord) -> None:
    found = decode_frames(encode_frame(record), limit=10, is_end=True)
    assert found.records == [record]
    assert (found.damaged_bytes, found.torn_bytes) == (0, 0)


@given(st.integers(0, 5 * SIZE), st.booleans())
def test_a_torn_tail_costs_the_torn_record_only(size: int, is_end: bool) -> None:
    found = decode_frames(b"".join(FRAMES)[:size], limit=10, is_end=is_end)
    assert numbers(found.records) == list(range(size // SIZE))
    assert found.damaged_bytes == 0
    assert found.torn_bytes == (size % SIZE if is_end else 0)
    assert found.size_bytes == (size if is_end else size - size % SIZE)


@given(st.integers(0, 5 * SIZE - 1), st.integers(1, 255))
def test_a_damaged_byte_costs_the_record_it_is_in_only(position: int, change: int) -> None:
    damaged = bytearray(b"".join(FRAMES))
    damaged[position] ^= change
    found = decode_frames(bytes(damaged), limit=10, is_end=True)
    hit = position // SIZE
    assert numbers(found.records) == [number for number in range(5) if number != hit]
    assert found.damaged_bytes + found.torn_bytes == SIZE
    assert found.size_bytes == 5 * SIZE


@given(st.binary(max_size=200), st.binary(max_size=200))
def test_lost_bytes_before_a_frame_are_passed_over(before: bytes, after: bytes) -> None:
    found = decode_frames(before + FRAMES[1] + after + FRAMES[2], limit=10, is_end=True)
    assert found.size_bytes == len(before) + len(after) + 2 * SIZE
    assert {1, 2} >= set(numbers(found.records))
    if MAGIC[:1] not in before + after:
        assert numbers(found.records) == [1, 2]


def test_no_more_are_taken_than_asked_for() -> None:
    found = decode_frames(b"".join(FRAMES), limit=2, is_end=True)
    assert numbers(found.records) == [0, 1]
    assert found.size_bytes == 2 * SIZE


@given(st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=8), st.data())
def test_a_piece_never_stands_still(pieces: list[bytes], data: st.DataObject) -> None:
    piece = b"".join(data.draw(st.permutations([*pieces, FRAMES[0], MAGIC])))
    offset = 0
    while offset < len(piece):
        found = decode_frames(piece[offset:], limit=1, is_end=True)
        assert found.size_bytes > 0
        offset += found.size_bytes


def test_fields_of_other_versions_are_passed_over_or_take_their_defaults() -> None:
    fields = msgspec.to_builtins(SAMPLE)
    del fields["priority"]
    payload = msgspec.msgpack.encode({**fields, "colour": "red"})
    import zlib

    frame = struct.pack("<4sII", MAGIC, len(payload), zlib.crc32(payload)) + payload
    assert decode_frames(frame, limit=1, is_end=True).records == [SAMPLE]


@pytest.mark.parametrize("changes", [{"tenant_id": "\ud800"}, {"status": 2**70}, {"key_id": "x" * MAX_PAYLOAD_BYTES}])
def test_what_cannot_be_written_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        encode_frame(make_record(**changes))


def test_a_record_is_cleaned_of_what_no_database_takes() -> None:
    record = make_record(tenant_id="a\0\ud800", status=2**70, modes=("\0",), is_stream=True)
    assert clean_record(record) == make_record(tenant_id="a??", status=2**63 - 1, modes=("?",), is_stream=True)
    assert clean_record(SAMPLE) == SAMPLE
