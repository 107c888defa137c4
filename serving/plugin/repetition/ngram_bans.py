"""Computes the tokens that the no-repeat-n-gram rule bans next, incrementally for each token. Pure.

The rule is exactly that of vLLM's `NoRepeatNGramLogitsProcessor`: token t is banned if an n-gram that starts within the
last `window` output tokens ends with t and its first n - 1 tokens equal the last n - 1 tokens of the output.

Each sequence has a ring of its last `window` tokens, a rolling hash of the last n - 1 of them, and a chained hash table
from that hash to the positions where the same n - 1 tokens ended before. A chain is ordered from new to old and is
followed to the first position outside the window, so nothing needs to be deleted. A position whose next token is
whitelisted is not inserted, so endless table cells produce no chain. Every hit is compared token by token before it
bans: that takes n steps, but a ban requires n - 1 matching tokens. The time per token is therefore constant on
average, for any n and window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, TypeVar

import numba
import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
_Function = TypeVar("_Function", bound=Callable[..., Any])

_LENGTH, _START, _SIZE, _WINDOW, _RING, _MASK, _SHIFT, _WHITE, _NUM_WHITE, _NUM_FIELDS = range(10)
"""Columns of the table of seats. START: first token in the ring after a resume; RING, WHITE: offsets in the arenas."""
HASH_BASE = np.uint64(0x9E3779B97F4A7C15)
"""A prefix t1 ... tk has the hash (t1 + 1) * HASH_BASE^(k-1) + ... + (tk + 1), modulo 2^64."""
_SPREAD = np.uint64(0xD6E8FEB86659FD93)
_SKIP, _NOTHING_NEW = -2, -1
_last = itemgetter(-1)


def _compiled(function: _Function) -> _Function:
    """Compile a function, cached on disk between starts if possible."""
    try:
        compiled = numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # there is no writable directory
        compiled = numba.njit(nogil=True)(function)
    return compiled


@_compiled
def _bucket(value: Any, shift: int) -> Any:
    return np.int64((value * _SPREAD) >> np.uint64(shift))


@_compiled
def _is_white(token: int, white: Any, start: int, count: int) -> bool:
    """Return whether a token is in a sequence's sorted whitelist, by binary search."""
    low, high = start, start + count
    while low < high:
        middle = (low + high) >> 1
        if white[middle] < token:
            low = middle + 1
        else:
            high = middle
    return low < start + count and white[low] == token


@_compiled
def _push(seat: int, token: int, table: Any, rolling: Any, rings: Any, hashes: Any, white: Any) -> None:
    """Append a token. `rings` has three rows: tokens, newest position by bucket, next older position in the chain."""
    row = table[seat]
    ring, mask, length, prefix = row[_RING], row[_MASK], row[_LENGTH], row[_SIZE] - 1
    value = rolling[seat, 0]
    if length - row[_START] >= prefix:
        if not _is_white(token, white, row[_WHITE], row[_NUM_WHITE]):
            # The tokens that ended at length - 1 now have a successor, which they can ban from now on.
            place = length - 1
            head = ring + _bucket(value, row[_SHIFT])
            rings[2, ring + (place & mask)] = rings[1, head]
            rings[1, head] = place
            hashes[ring + (place & mask)] = value
        value -= np.uint64(rings[0, ring + ((length - prefix) & mask)] + 1) * rolling[seat, 1]
    rolling[seat, 0] = value * HASH_BASE + np.uint64(token + 1)
    rings[0, ring + (length & mask)] = token
    row[_LENGTH] = length + 1


@_compiled
def _find(seat: int, table: Any, rolling: Any, rings: Any, hashes: Any, which: int, out: Any, found: int) -> int:
    """Add a sequence's bans to `out` after `found` others, as far as there is room. Return the new count."""
    row = table[seat]
    ring, mask, length, prefix = row[_RING], row[_MASK], row[_LENGTH], row[_SIZE] - 1
    if length - row[_START] <= prefix:
        return found
    value = rolling[seat, 0]
    oldest = max(length - row[_WINDOW], row[_START]) + prefix - 1
    place = rings[1, ring + _bucket(value, row[_SHIFT])]
    while place >= oldest:
        if hashes[ring + (place & mask)] == value:
            back = 0
            while back < prefix and (
                rings[0, ring + ((place - back) & mask)] == rings[0, ring + ((length - 1 - back) & mask)]
            ):
                back += 1
            if back == prefix:
                if found < out.shape[1]:
                    out[0, found] = which
                    out[1, found] = rings[0, ring + ((place + 1) & mask)]
                found += 1
        place = rings[2, ring + (place & mask)]
    return found


@_compiled
def _push_all(seat: int, tokens: Any, table: Any, rolling: Any, rings: Any, hashes: Any, white: Any) -> None:
    for token in tokens:
        _push(seat, token, table, rolling, rings, hashes, white)


@_compiled
def _advance(seats: Any, tokens: Any, table: Any, rolling: Any, rings: Any, hashes: Any, white: Any, out: Any) -> int:
    """Push one token per sequence and collect all bans. Return their number, which may exceed the room in `out`."""
    found = 0
    for which in range(seats.shape[0]):
        seat, token = seats[which], tokens[which]
        if token >= 0:
            _push(seat, token, table, rolling, rings, hashes, white)
        if token != _SKIP:
            found = _find(seat, table, rolling, rings, hashes, which, out, found)
    return found


class NGramBans:
    """The state of many sequences; each has a seat, independent of its row in the batch.

    The constructor compiles all functions, so that the first token is not slower than others.
    """

    def __init__(self, max_length: int) -> None:
        """Create the state without sequences.

        Args:
            max_length: the largest number of output tokens of a sequence; larger windows are equivalent to it.
        """
        self._max_length = max(2, max_length)
        self._table = np.zeros((8, _NUM_FIELDS), np.int64)
        self._rolling = np.zeros((8, 2), np.uint64)
        self._rings = np.zeros((3, 0), np.int32)
        self._hashes = np.zeros(0, np.uint64)
        self._white = np.zeros(0, np.int64)
        self._out = np.zeros((2, 64), np.int64)
        self._free_seats = list(range(8))
        self._ring_arena, self._white_arena = _Arena(), _Arena()
        self._compile()

    def _compile(self) -> None:
        seat = self.open(2, 2)
        self.advance(np.array([seat]), [[1, 1]])
        self.advance(np.array([seat]), [[1, 1, 1]])
        self.close(seat)

    def open(self, size: int, window: int, whitelist: frozenset[int] = frozenset()) -> int:
        """Return a seat for a sequence without tokens.

        Args:
            size: n, including the banned token; from 2 to `window`.
            window: how many of the last output tokens are considered.
            whitelist: tokens that are never banned.

        Raises:
            ValueError: no token can be banned with this size and window.
        """
        window = min(window, self._max_length)
        if not 2 <= size <= window:
            raise ValueError(f"n-grams of {size} in a window of {window} ban nothing")
        seat = self._take_seat()
        bits = window.bit_length()
        ring = self._ring_arena.take(1 << bits)
        white = self._white_arena.take(len(whitelist))
        self._grow(self._ring_arena.size, self._white_arena.size)
        self._white[white : white + len(whitelist)] = sorted(whitelist)
        self._table[seat] = (0, 0, size, window, ring, (1 << bits) - 1, 64 - bits, white, len(whitelist))
        self._rolling[seat, 1] = pow(int(HASH_BASE), size - 2, 1 << 64)
        self._restart(seat, 0)
        return seat

    def close(self, seat: int) -> None:
        """Release a seat."""
        row = self._table[seat]
        self._ring_arena.give(int(row[_RING]), int(row[_MASK]) + 1)
        self._white_arena.give(int(row[_WHITE]), int(row[_NUM_WHITE]))
        self._free_seats.append(seat)

    def push(self, seat: int, tokens: IntArray) -> None:
        """Append tokens to a sequence without looking for bans."""
        _push_all(seat, tokens, self._table, self._rolling, self._rings, self._hashes, self._white)

    def advance(self, seats: IntArray, outputs: Sequence[list[int]]) -> tuple[IntArray, IntArray]:
        """Add the new tokens of the sequences, and return the tokens that are banned next.

        Args:
            seats: the seat of each sequence.
            outputs: all output tokens of each sequence. There is usually one more than at the last call; any other
                history (resumed, truncated) is handled too. A sequence that ends with placeholders (negative) is
                skipped until they have become tokens.

        Returns:
            Indices into `seats`, and the token banned for each. Both are valid until the next call.
        """
        tokens = self._new_tokens(seats, outputs)
        state = (self._table, self._rolling, self._rings, self._hashes)
        found = _advance(seats, tokens, *state, self._white, self._out)
        if found > self._out.shape[1]:
            self._out = np.zeros((2, 2 * found), np.int64)
            tokens[tokens >= 0] = _NOTHING_NEW
            _advance(seats, tokens, *state, self._white, self._out)
        return self._out[0, :found], self._out[1, :found]

    def _new_tokens(self, seats: IntArray, outputs: Sequence[list[int]]) -> IntArray:
        """Return the new token of each sequence; sequences with more or fewer new tokens are updated here."""
        count = len(outputs)
        lengths = np.fromiter(map(len, outputs), np.int64, count)
        is_usual = lengths - self._table[seats, _LENGTH] == 1
        if is_usual.all():
            tokens = np.fromiter(map(_last, outputs), np.int64, count)
            is_usual = tokens >= 0
            if is_usual.all():
                return tokens
        tokens = np.empty(count, np.int64)
        for which, output in enumerate(outputs):
            tokens[which] = output[-1] if is_usual[which] else self._catch_up(int(seats[which]), output)
        return tokens

    def _catch_up(self, seat: int, output: list[int]) -> int:
        """Update a seat to its sequence's history. Return the value that tells `_advance` what is left to do."""
        length = len(output)
        while length and output[length - 1] < 0:
            length -= 1
        row = self._table[seat]
        begin = max(0, length - int(row[_WINDOW]))
        if length < row[_LENGTH] or begin > row[_LENGTH]:
            self._restart(seat, begin)
        new = np.array(output[int(row[_LENGTH]) : length], np.int64)
        self.push(seat, new)
        return _NOTHING_NEW if length == len(output) else _SKIP

    def _restart(self, seat: int, begin: int) -> None:
        """Drop the tokens of a seat; its sequence continues at index `begin`, the start of the window."""
        row = self._table[seat]
        row[_LENGTH] = row[_START] = begin
        self._rolling[seat, 0] = 0
        self._rings[1, row[_RING] : row[_RING] + row[_MASK] + 1] = -1

    def _take_seat(self) -> int:
        if not self._free_seats:
            count = len(self._table)
            self._table = np.concatenate([self._table, np.zeros_like(self._table)])
            self._rolling = np.concatenate([self._rolling, np.zeros_like(self._rolling)])
            self._free_seats = list(range(count, 2 * count))
        return self._free_seats.pop()

    def _grow(self, ring_size: int, white_size: int) -> None:
        if ring_size > len(self._hashes):
            more = max(ring_size, 1024)
            self._rings = np.concatenate([self._rings, np.zeros((3, more), np.int32)], axis=1)
            self._hashes = np.concatenate([self._hashes, np.zeros(more, np.uint64)])
        if white_size > len(self._white):
            self._white = np.concatenate([self._white, np.zeros(max(white_size, 64), np.int64)])


class _Arena:
    """Offsets of blocks in an array that only grows; released blocks are reused for the same size."""

    def __init__(self) -> None:
        self.size = 0
        self._free: dict[int, list[int]] = {}

    def take(self, size: int) -> int:
        free = self._free.get(size)
        if free:
            return free.pop()
        self.size += size
        return self.size - size

    def give(self, offset: int, size: int) -> None:
        self._free.setdefault(size, []).append(offset)
