from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.cluster.directory import ReplicaRecord, ReplicaState
from serving.plugin.modes.selection import MODES
from serving.router.request.parsing import RoutedRequest
from serving.router.scheduling.work_estimate import (
    CHARS_PER_TOKEN,
    MIXED,
    TEXT,
    UNKNOWN,
    UNKNOWN_IMAGE_TOKENS,
    ImageReading,
    OutputForecast,
    estimate_work,
    read_images,
)

A4 = (1654, 2339)
CONFIG = (("base_size", 1024), ("image_size", 640), ("crop_mode", True))


def replica(
    config: tuple[tuple[str, Any], ...] | None = CONFIG, options: tuple[tuple[str, Any], ...] = ()
) -> ReplicaRecord:
    return ReplicaRecord(
        "a", "nano", "http://a", ReplicaState.READY, 4, 65_536, 8192, image_config=config, image_options=options
    )


def ask(*sizes: tuple[int, int] | None, options: dict[str, Any] | None = None, **more: Any) -> RoutedRequest:
    return RoutedRequest("/v1/chat/completions", "nano", b"", True, True, tuple(sizes), options or {}, **more)


def test_the_default_for_an_unknown_image_is_an_a4_page_in_gundam_mode() -> None:
    assert MODES["gundam"].num_tokens(*A4) == UNKNOWN_IMAGE_TOKENS
    assert read_images(ask(A4), replica()) == ImageReading(("gundam",), UNKNOWN_IMAGE_TOKENS, "gundam")


@pytest.mark.parametrize(
    ("request_", "record", "reading"),
    [
        (ask(), None, ImageReading((), 0, TEXT)),
        (ask(A4), None, ImageReading((), None, UNKNOWN)),
        (ask(A4, None), replica(), ImageReading((), None, UNKNOWN)),
        (ask(A4), replica(config=None), ImageReading((), None, UNKNOWN)),
        (ask(A4), replica(config=()), ImageReading(("gundam",), UNKNOWN_IMAGE_TOKENS, "gundam")),
        (ask(A4, options={"mode": "base"}), replica(), ImageReading(("base",), 273, "base")),
        (ask(A4), replica(options=(("mode", "tiny"),)), ImageReading(("tiny",), 73, "tiny")),
        (ask(A4, A4, options={"mode": ["base", "tiny"]}), replica(), ImageReading(("base", "tiny"), 346, MIXED)),
        (ask(A4, options={"mode": "huge"}), replica(), ImageReading((), None, UNKNOWN)),
        (ask(A4, options={"mode": {"a": []}}), replica(), ImageReading((), None, UNKNOWN)),
        (ask(A4, options={"x" * 9999: "y" * 9999}), replica(), ImageReading((), None, UNKNOWN)),
    ],
)
def test_how_images_are_read(request_: RoutedRequest, record: ReplicaRecord | None, reading: ImageReading) -> None:
    assert read_images(request_, record) == reading
    assert read_images(request_, record) == reading  # from memory


def test_equal_keys_that_are_not_equally_right_do_not_spoil_each_other() -> None:
    wrong = read_images(ask(A4, options={"max_tiles": 4.0}), replica())
    right = read_images(ask(A4, options={"max_tiles": 4}), replica())
    assert wrong == ImageReading()
    assert right.modes == ("gundam",)


def test_the_forecast_starts_with_the_prior_and_follows_what_it_sees() -> None:
    forecast = OutputForecast(512)
    assert forecast.expect("nano", "base", 2) == 1024
    for _ in range(200):
        forecast.observe("nano", "base", 2, 200)
    assert forecast.expect("nano", "base", 1) == pytest.approx(100, rel=0.01)
    assert forecast.expect("nano", "tiny", 1) == 512
    assert forecast.expect("other", "base", 1) == 512


def test_what_a_request_is_expected_to_take() -> None:
    forecast = OutputForecast(512)
    work = estimate_work(ask(num_text_chars=30), ImageReading((), 100, "base"), forecast)
    assert (work.prompt_tokens, work.output_tokens) == (100 + 30 // CHARS_PER_TOKEN + 1, 512)
    assert work.total == work.prompt_tokens + work.output_tokens
    assert estimate_work(ask(None), ImageReading(), forecast).prompt_tokens == UNKNOWN_IMAGE_TOKENS + 1
    assert estimate_work(ask(max_tokens=7, num_choices=3), ImageReading((), 0, TEXT), forecast).output_tokens == 21


@given(
    st.integers(0, 10**9),
    st.none() | st.integers(0, 10**9),
    st.integers(0, 16),
    st.integers(0, 10**6),
    st.integers(1, 10**5),
    st.floats(0, 1e6),
)
def test_no_request_counts_for_more_than_the_longest_that_the_engine_runs(
    chars: int, max_tokens: int | None, num_choices: int, image_tokens: int, longest: int, prior: float
) -> None:
    request = ask(num_text_chars=chars, max_tokens=max_tokens, num_choices=num_choices)
    work = estimate_work(request, ImageReading((), image_tokens, "base"), OutputForecast(prior), longest)
    assert 1 <= work.prompt_tokens <= longest
    assert 1 <= work.output_tokens <= longest * max(1, num_choices)
    if max_tokens:
        assert work.output_tokens <= max_tokens * max(1, num_choices)


REPLICA = ReplicaRecord(
    "a",
    "nano",
    "http://a",
    ReplicaState.READY,
    image_config=(("base_size", 512), ("crop_mode", False), ("image_size", 512)),
    image_options=(("mode", "small"),),
)


def routed(*sizes: tuple[int, int] | None, **options: Any) -> RoutedRequest:
    return RoutedRequest(
        "/v1/chat/completions",
        "nano",
        b"",
        is_stream=False,
        wants_stream_usage=False,
        image_sizes=sizes,
        image_options=options,
    )


@pytest.mark.parametrize(
    ("request_", "replica", "modes"),
    [
        (routed((30, 20)), REPLICA, ("small",)),
        (routed((30, 20), (9, 9), mode=["default", "base"]), REPLICA, ("tiny", "base")),
        (routed((30, 20), (2000, 3000), mode="auto"), REPLICA, ("tiny", "gundam")),
        (routed(), REPLICA, ()),
        (routed((30, 20), None), REPLICA, ()),
        (routed((30, 20), mode="huge"), REPLICA, ()),
        (routed((30, 20), colour="red"), REPLICA, ()),
        (routed((30, 20)), dataclasses.replace(REPLICA, image_options=()), ("tiny",)),
        (routed((30, 20)), dataclasses.replace(REPLICA, image_config=None), ()),
        (routed((30, 20)), dataclasses.replace(REPLICA, image_config=(), image_options=()), ("gundam",)),
    ],
)
def test_the_mode_of_every_image_is_told_where_it_is_known(
    request_: RoutedRequest, replica: ReplicaRecord, modes: tuple[str, ...]
) -> None:
    assert read_images(request_, replica).modes == modes


VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.text() | st.integers())


@given(st.dictionaries(st.sampled_from(["mode", "min_tiles", "max_tiles", "x"]), VALUES))
def test_arbitrary_image_options_leave_the_modes_to_the_engine(options: dict[str, Any]) -> None:
    assert len(read_images(routed((30, 20), **options), REPLICA).modes) in (0, 1)
