"""Threads of the encoder: every batch once, in order, whoever encodes it."""

from __future__ import annotations

import threading

import pytest
import torch

from serving.plugin.model.view_threads import ViewThreads


def numbers(count: int) -> list[torch.Tensor]:
    return [torch.tensor(number) for number in range(count)]


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("num_batches", [0, 1, 2, 17])
def test_every_batch_is_encoded_once_and_results_keep_their_order(num_threads: int, num_batches: int) -> None:
    seen: list[int] = []

    def encode(batch: torch.Tensor) -> torch.Tensor:
        seen.append(int(batch))
        return batch * 10

    threads = ViewThreads(num_threads)
    for _ in range(20):
        seen.clear()
        found = threads.map(encode, numbers(num_batches))
        assert [int(each) for each in found] == [10 * number for number in range(num_batches)]
        assert sorted(seen) == [*range(num_batches)]


def test_batches_are_encoded_at_the_same_time() -> None:
    meeting = threading.Barrier(2, timeout=20)

    def encode(batch: torch.Tensor) -> torch.Tensor:
        meeting.wait()
        return batch

    assert len(ViewThreads(2).map(encode, numbers(2))) == 2


def test_one_thread_is_the_calling_one() -> None:
    used: set[int] = set()

    def encode(batch: torch.Tensor) -> torch.Tensor:
        used.add(threading.get_ident())
        return batch

    ViewThreads(1).map(encode, numbers(5))
    assert used == {threading.get_ident()}


@pytest.mark.parametrize("is_inference", [True, False])
def test_helpers_are_in_the_callers_inference_mode(is_inference: bool) -> None:
    meeting = threading.Barrier(2, timeout=20)

    def encode(batch: torch.Tensor) -> torch.Tensor:
        meeting.wait()
        return torch.tensor(torch.is_inference_mode_enabled())

    with torch.inference_mode(is_inference):
        assert [bool(mode) for mode in ViewThreads(2).map(encode, numbers(2))] == [is_inference] * 2


@pytest.mark.parametrize("failing", [0, 1, 4])
def test_an_error_of_any_thread_is_raised_and_the_next_step_works(failing: int) -> None:
    def encode(batch: torch.Tensor) -> torch.Tensor:
        if batch == failing:
            raise RuntimeError(f"out of memory at {batch}")
        return batch

    threads = ViewThreads(2)
    with pytest.raises(RuntimeError, match=f"at {failing}"):
        threads.map(encode, numbers(5))
    assert len(threads.map(torch.neg, numbers(5))) == 5


def test_the_environment_says_how_many() -> None:
    assert ViewThreads.from_environ({}).num_threads == 1
    assert ViewThreads.from_environ({"SERVING_ENCODER_THREADS": ""}).num_threads == 1
    assert ViewThreads.from_environ({"SERVING_ENCODER_THREADS": "3"}).num_threads == 3


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", "²"])
def test_anything_but_a_number_from_one_on_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="SERVING_ENCODER_THREADS must be a whole number"):
        ViewThreads.from_environ({"SERVING_ENCODER_THREADS": text})
