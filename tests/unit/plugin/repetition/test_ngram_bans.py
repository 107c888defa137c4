"""The incremental core against vLLM's `NoRepeatNGramLogitsProcessor`: the same bans after every token."""

from __future__ import annotations

import time
import types
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.plugin.repetition.ngram_bans import HASH_BASE, NGramBans

VOCABULARY = 6
BANS = NGramBans(max_length=64)
"""Shared by the examples, so that seats and rings are used again with what others left in them."""


def banned_by_stock(
    stock: types.ModuleType, size: int, window: int, whitelist: set[int], output: list[int]
) -> set[int]:
    logits = stock.NoRepeatNGramLogitsProcessor(size, window, whitelist)(output, torch.zeros(VOCABULARY))
    return set(torch.isinf(logits).nonzero().flatten().tolist())


@dataclass
class Stream:
    """One sequence: its rule and what happens to it. A step is a list of new tokens, or how many to take back."""

    size: int
    window: int
    whitelist: set[int]
    steps: list[list[int] | int]
    output: list[int] = field(default_factory=list)

    def step(self, which: int) -> None:
        what = self.steps[which % len(self.steps)]
        if isinstance(what, int):
            del self.output[max(0, len(self.output) - what) :]
        else:
            self.output.extend(what)


@st.composite
def streams(draw: st.DrawFn) -> Stream:
    letters = st.integers(0, draw(st.integers(0, VOCABULARY - 1)))
    size = draw(st.integers(2, 7))
    window = draw(st.integers(size, 40))
    usual = st.lists(letters, min_size=1, max_size=1)
    steps = st.lists(st.one_of(usual, usual, usual, st.lists(letters, max_size=50), st.integers(1, 30)), min_size=1)
    return Stream(size, window, draw(st.sets(letters)), draw(steps))


@settings(max_examples=300, deadline=None)
@given(batch=st.lists(streams(), min_size=1, max_size=5), num_steps=st.integers(1, 40))
def test_bans_what_vllms_processor_bans_after_every_step(
    stock: types.ModuleType, batch: list[Stream], num_steps: int
) -> None:
    seats = np.array([BANS.open(one.size, min(one.window, 64), frozenset(one.whitelist)) for one in batch])
    for step in range(num_steps):
        for one in batch:
            one.step(step)
            del one.output[64:]
        which, tokens = BANS.advance(seats, [one.output for one in batch])
        for index, one in enumerate(batch):
            wanted = banned_by_stock(stock, one.size, one.window, one.whitelist, one.output)
            assert set(tokens[which == index].tolist()) == wanted, one
    for seat in seats:
        BANS.close(int(seat))


def test_bans_the_token_that_would_complete_the_recipes_30_gram_again() -> None:
    bans = NGramBans(8192)
    cycle = [*range(100, 140)]
    output = cycle + cycle[:29]
    seat = np.array([bans.open(30, 90, frozenset({265, 266}))])
    assert [part.tolist() for part in bans.advance(seat, [output])] == [[0], [129]]


def test_a_window_longer_than_any_output_looks_back_to_the_begin() -> None:
    bans = NGramBans(max_length=100)
    seat = np.array([bans.open(3, 10**12)])
    output = [1, 2, 3, *range(4, 98), 1, 2]
    assert bans.advance(seat, [output])[1].tolist() == [3]


@pytest.mark.parametrize(("size", "window"), [(0, 90), (1, 90), (31, 30), (101, 500)])
def test_refuses_what_bans_nothing(size: int, window: int) -> None:
    with pytest.raises(ValueError, match="ban nothing"):
        NGramBans(100).open(size, window)


def test_placeholders_wait_until_they_are_tokens() -> None:
    bans = NGramBans(100)
    seat = np.array([bans.open(2, 10)])
    output = [1, 2, 1]
    assert bans.advance(seat, [output])[1].tolist() == [2]
    output.append(-1)
    assert bans.advance(seat, [output])[1].tolist() == []
    output[-1] = 2
    output.append(-1)
    assert bans.advance(seat, [output])[1].tolist() == []
    output[-1] = 9
    output.append(2)
    assert sorted(bans.advance(seat, [output])[1].tolist()) == [1, 9]


def test_more_bans_than_there_was_room_for_are_all_reported() -> None:
    bans = NGramBans(4096)
    seat = np.array([bans.open(2, 4096)])
    output = [token for other in range(1, 500) for token in (0, other)] + [0]
    assert sorted(bans.advance(seat, [output])[1].tolist()) == [*range(1, 500)]


def test_many_sequences_open_at_once_keep_apart(stock: types.ModuleType) -> None:
    bans, generator = NGramBans(512), np.random.default_rng(0)
    rules = [
        (int(size), int(size + more), {3} if size % 2 else set()) for size, more in generator.integers(2, 40, (70, 2))
    ]
    seats = np.array([bans.open(size, window, frozenset(white)) for size, window, white in rules])
    outputs: list[list[int]] = [[] for _ in rules]
    for _ in range(120):
        for output, token in zip(outputs, generator.integers(0, 2, len(outputs)), strict=True):
            output.append(int(token) * 3)
        which, tokens = bans.advance(seats, outputs)
    for index, (rule, output) in enumerate(zip(rules, outputs, strict=True)):
        assert set(tokens[which == index].tolist()) == banned_by_stock(stock, *rule, output)


def hash_of(prefix: list[int]) -> int:
    value = 0
    for token in prefix:
        value = (value * int(HASH_BASE) + token + 1) % 2**64
    return value


def test_equal_hashes_of_different_prefixes_ban_nothing() -> None:
    # A Thue-Morse word of 2^11 letters and its complement have the same polynomial hash modulo 2^64, whatever its base.
    word = [index.bit_count() % 2 for index in range(2**11)]
    complement = [1 - letter for letter in word]
    assert hash_of(word) == hash_of(complement)
    size, window = len(word) + 1, 7000
    bans = NGramBans(window)
    seat = np.array([bans.open(size, window)])
    output = [*word, 5]
    bans.advance(seat, [output])
    output += complement
    assert bans.advance(seat, [output])[1].tolist() == []
    output += word
    assert bans.advance(seat, [output])[1].tolist() == [5]


def test_the_time_per_token_does_not_grow_with_size_and_window() -> None:
    def seconds(size: int, window: int) -> float:
        bans, tokens = NGramBans(20_000), np.random.default_rng(1).integers(0, 100_000, 20_000)
        seat = bans.open(size, window)
        begin = time.thread_time()
        bans.push(seat, tokens)
        return time.thread_time() - begin

    small, large = (min(seconds(*rule) for _ in range(5)) for rule in ((30, 90), (3000, 9000)))
    assert large < 10 * small, (small, large)
