"""The loop stop: what is a loop and what is not, per request, configured, and wired into vLLM's schedulers."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.plugin.interfaces import metrics, vllm_internals
from serving.plugin.repetition import loop_stop
from serving.plugin.repetition.loop_stop import (
    DEFAULT_REPEATED_TOKENS,
    QUALIFIED_NAME,
    LoopStop,
    LoopWatch,
    build_scheduler,
    configure,
    configured_tokens,
    count_stops,
    repeated_at_end,
    repeated_tokens_of,
)


def tokens_until_cut(output: list[int], repeated_tokens: int) -> int | None:
    """How long the output has become when the watch, asked at every stride as the scheduler does, says so."""
    watch = LoopWatch(repeated_tokens)
    ends = range(16, len(output) + 1, 16)
    return next((end for end in ends if watch.is_looping(output[:end])), None)


def num_repeated(output: list[int], longest_cycle: int) -> int:
    """The most tokens at the end that equal the one some distance, up to the longest cycle, before them. Slow."""
    most = 0
    for distance in range(1, longest_cycle + 1):
        count = 0
        while count + distance < len(output) and output[-1 - count] == output[-1 - count - distance]:
            count += 1
        most = max(most, count)
    return most


@settings(max_examples=200, deadline=None)
@given(
    begin=st.lists(st.integers(0, 5), max_size=80),
    cycle=st.lists(st.integers(0, 5), min_size=1, max_size=60),
    repeated_tokens=st.integers(64, 200),
)
def test_a_loop_is_cut_within_the_set_number_of_repeated_tokens(
    begin: list[int], cycle: list[int], repeated_tokens: int
) -> None:
    output = begin + cycle * (1 + 2 * repeated_tokens // len(cycle))
    end = tokens_until_cut(output, repeated_tokens)
    if len(cycle) <= repeated_tokens // 2:
        assert end is not None
        assert end - len(begin) - len(cycle) <= repeated_tokens
    if end is not None:
        assert repeated_tokens - 15 <= num_repeated(output[:end], repeated_tokens // 2)


@settings(max_examples=200, deadline=None)
@given(output=st.lists(st.integers(0, 1), min_size=16, max_size=400), repeated_tokens=st.integers(64, 100))
def test_nothing_is_cut_that_repeats_less_than_that(output: list[int], repeated_tokens: int) -> None:
    end = tokens_until_cut(output, repeated_tokens)
    if end is not None:
        assert repeated_tokens - 15 <= num_repeated(output[:end], repeated_tokens // 2) <= repeated_tokens


def test_a_table_with_a_hundred_empty_cells_is_no_loop_and_one_without_end_is() -> None:
    begin, cells = [*range(300, 400)], [265, 266]
    assert tokens_until_cut(begin + cells * 100 + begin, DEFAULT_REPEATED_TOKENS) is None
    assert tokens_until_cut(begin + cells * 1000, DEFAULT_REPEATED_TOKENS) is not None


def test_a_passage_that_comes_twice_is_no_loop() -> None:
    passage = [*range(1000, 1250)]
    assert tokens_until_cut(passage * 2 + [7] * 100, DEFAULT_REPEATED_TOKENS) is None
    assert tokens_until_cut(passage * 4, DEFAULT_REPEATED_TOKENS) is not None


def test_an_output_that_was_taken_back_is_looked_at_anew() -> None:
    watch, cycle = LoopWatch(64), [1, 2, 3, 4]
    assert not watch.is_looping([*range(10, 50), *cycle * 10])
    assert not watch.is_looping([*range(60, 80)])
    assert not watch.is_looping([*range(60, 80), *cycle * 11])
    assert watch.is_looping([*range(60, 80), *cycle * 30])


def request(output: list[int], *, has_image: bool = True, **params: Any) -> Any:
    sampling = {"extra_args": None, "ignore_eos": False, "min_tokens": 0} | params
    return types.SimpleNamespace(
        request_id="r",
        sampling_params=types.SimpleNamespace(**sampling),
        mm_features=["image"] if has_image else [],
        output_token_ids=output,
        num_output_tokens=len(output),
    )


class Hashable(types.SimpleNamespace):
    __hash__ = object.__hash__  # type: ignore[assignment]  # SimpleNamespace has None


def is_cut(default: int, **given: Any) -> bool:
    stop, wanted = LoopStop(default), Hashable(**vars(request([1, 2] * 512, **given)))
    return stop.must_end(wanted)


def test_requests_with_an_image_are_watched_and_others_only_when_they_ask() -> None:
    assert is_cut(512)
    assert not is_cut(512, has_image=False)
    assert is_cut(512, has_image=False, extra_args={"repeated_tokens": 64})


def test_a_request_can_turn_it_off_and_on() -> None:
    assert not is_cut(512, extra_args={"repeated_tokens": 0})
    assert not is_cut(0)
    assert is_cut(0, extra_args={"repeated_tokens": 512})
    assert not is_cut(512, extra_args={"repeated_tokens": 2000})


def test_requests_that_may_not_end_by_themselves_are_left_alone() -> None:
    assert not is_cut(512, ignore_eos=True)
    assert not is_cut(512, min_tokens=1025)
    assert is_cut(512, min_tokens=1024)


@pytest.mark.parametrize("value", [-1, 1, 63, True, "512", 512.0, None])
def test_refuses_arguments_that_cannot_be_meant(value: object) -> None:
    with pytest.raises(ValueError, match="repeated_tokens"):
        repeated_tokens_of({"repeated_tokens": value}, 0)


def engine_config(additional: dict[str, Any], **scheduler: Any) -> Any:
    return types.SimpleNamespace(
        additional_config=additional,
        model_config=types.SimpleNamespace(runner_type="generate"),
        scheduler_config=types.SimpleNamespace(**({"scheduler_cls": None, "async_scheduling": False} | scheduler)),
    )


def test_configuration() -> None:
    assert configured_tokens(engine_config({})) == DEFAULT_REPEATED_TOKENS
    assert configured_tokens(engine_config({"loop_stop": {"repeated_tokens": 64}})) == 64
    assert configured_tokens(engine_config({"loop_stop": False})) == 0
    wrongs: list[Any] = [True, [], {"tokens": 3}, {"repeated_tokens": "many"}]
    for wrong in wrongs:
        with pytest.raises(ValueError, match="loop_stop"):
            configure(engine_config({"loop_stop": wrong}))


def test_takes_the_schedulers_place_unless_it_is_taken() -> None:
    config = engine_config({})
    configure(config)
    assert config.scheduler_config.scheduler_cls == QUALIFIED_NAME
    taken = engine_config({}, scheduler_cls="mine")
    configure(taken)
    assert taken.scheduler_config.scheduler_cls == "mine"


@pytest.fixture
def build_bare_scheduler(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], Any]:
    """Builds the scheduler with the loop stop around vLLM's, which owns no cache."""
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    monkeypatch.setattr(Scheduler, "__init__", lambda self, **arguments: None)
    monkeypatch.setattr(AsyncScheduler, "__init__", lambda self, **arguments: None)

    def build(is_async: bool) -> Any:
        scheduler = build_scheduler(engine_config({}, async_scheduling=is_async))
        assert isinstance(scheduler, AsyncScheduler) == is_async
        scheduler.max_model_len = 8192
        scheduler.kv_cache_manager = types.SimpleNamespace(cache_blocks=lambda *_: None)
        return scheduler

    return build


def decode(scheduler: Any, output: list[int], block: int, **params: Any) -> Any:
    """Give a new request this output, so many tokens in a step, until it ends; return it."""
    from vllm import SamplingParams
    from vllm.v1.request import Request, RequestStatus

    given = {"max_tokens": 4000, "extra_args": {"repeated_tokens": 64}, **params}
    wanted = Request("r", [1, 2, 3], SamplingParams(**given), None)
    wanted.status = RequestStatus.RUNNING
    wanted.num_output_placeholders = len(output)
    for begin in range(0, len(output), block):
        before, step = wanted.num_output_tokens, output[begin : begin + block]
        new, is_stopped = scheduler._update_request_with_output(wanted, step)
        assert new == list(wanted.output_token_ids)[before:] == output[begin : begin + len(new)]
        assert new is step, "vLLM reads the list that it gave"
        if is_stopped:
            break
        assert len(new) == len(output[begin : begin + block])
    return wanted


@pytest.mark.parametrize("is_async", [False, True])
def test_vllms_scheduler_ends_a_looping_request_as_too_long(
    build_bare_scheduler: Callable[[bool], Any], is_async: bool
) -> None:
    found = decode(build_bare_scheduler(is_async), [n % 3 for n in range(1, 4000)], 1)
    assert found.num_output_tokens <= 3 + 64
    assert str(found.get_finished_reason()) == "length"
    assert found.stop_reason == "repetition"


@pytest.mark.parametrize("is_async", [False, True])
def test_an_answer_is_cut_at_the_same_token_however_many_come_in_a_step(
    build_bare_scheduler: Callable[[bool], Any], is_async: bool
) -> None:
    """As many as speculative decoding may accept."""
    scheduler = build_bare_scheduler(is_async)
    for prefix, cycle in ((0, 1), (5, 3), (70, 7), (200, 30)):
        output = [*range(100, 100 + prefix), *(n % cycle for n in range(600))]
        alone = decode(scheduler, output, 1)
        assert alone.stop_reason == "repetition"
        for block in range(2, 34):
            found = decode(scheduler, output, block)
            assert list(found.output_token_ids) == list(alone.output_token_ids), (prefix, cycle, block)
            assert (found.status, found.stop_reason) == (alone.status, alone.stop_reason)


def test_what_ends_an_answer_earlier_in_a_step_goes_before_the_loop_stop(
    build_bare_scheduler: Callable[[bool], Any],
) -> None:
    """The limit of 60 tokens comes before the loop is seen at 64, often in the same step."""
    output = [*range(100, 110), *([7] * 300)]
    for block in range(1, 34):
        found = decode(build_bare_scheduler(False), output, block, max_tokens=60)
        assert (found.num_output_tokens, found.stop_reason) == (60, None)


def test_a_request_that_ended_anyway_keeps_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    monkeypatch.setattr(Scheduler, "__init__", lambda self, **arguments: None)
    monkeypatch.setattr(Scheduler, "_update_request_with_output", lambda self, request, new, stale: (new, True))
    asked: list[Any] = []

    def must_end(request: Any) -> bool:
        asked.append(request)
        return False

    scheduler = vllm_internals.build_watched_scheduler(must_end, 1, "why", vllm_config=engine_config({}))
    request = types.SimpleNamespace(num_output_tokens=0)
    assert scheduler._update_request_with_output(request, [1]) == ([1], True)
    assert not asked


@settings(max_examples=200, deadline=None)
@given(
    begin=st.lists(st.integers(0, 5), max_size=80),
    cycle=st.lists(st.integers(0, 5), min_size=1, max_size=60),
    repeated_tokens=st.integers(64, 200),
)
def test_what_was_cut_has_wasted_what_it_repeated(begin: list[int], cycle: list[int], repeated_tokens: int) -> None:
    output = begin + cycle * (1 + 2 * repeated_tokens // len(cycle))
    end = tokens_until_cut(output, repeated_tokens)
    if end is not None:
        wasted = repeated_at_end(output[:end])
        assert repeated_tokens - 15 <= wasted <= num_repeated(output[:end], end)


def test_nothing_is_wasted_without_a_loop() -> None:
    assert repeated_at_end([]) == 0
    assert repeated_at_end([*range(1000)]) == 0
    assert repeated_at_end([*range(1000), *[7] * 40]) == 0


def test_stops_and_the_tokens_that_they_wasted_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    noters: list[Any] = []
    monkeypatch.setattr(loop_stop, "watch_early_length_ends", lambda length, note: noters.append((length, note)))
    count_stops(8192)
    ((length, note),) = noters
    assert length == 8192
    stops, wasted = metrics.REPETITION_STOPS, metrics.WASTED_TOKENS.labels("repetition")
    before = stops._value.get(), wasted._value.get()
    note([*range(100, 200), *[1, 2, 3] * 50])
    assert (stops._value.get(), wasted._value.get()) == (before[0] + 1, before[1] + 147)
