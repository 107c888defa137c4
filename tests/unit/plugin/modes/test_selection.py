"""Which mode an image is read in."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.plugin.modes.resolution import ResolutionMode
from serving.plugin.modes.selection import AUTO, DEFAULT, MODE_FOR_DETAIL, MODES, NAMES, ModeRules, ModeSelectionError

PUBLISHED = ModeRules.from_config({})
NANO = ModeRules.from_config({"base_size": 512, "image_size": 512, "crop_mode": False, "auto_min_scale": 1.0})
A4_200_DPI = (1654, 2339)


def names(rules: ModeRules, request: dict[str, Any], *sizes: tuple[int, int], **server: Any) -> list[str]:
    return [choice.name for choice in rules.choose(request, server, sizes)]


@pytest.mark.parametrize("name", MODES)
def test_a_named_mode_is_the_published_one(name: str) -> None:
    (choice,) = PUBLISHED.choose({"mode": name}, {}, [A4_200_DPI])
    assert (choice.name, choice.mode) == (name, MODES[name])


def test_nothing_chosen_is_the_checkpoints_own_mode() -> None:
    assert names(PUBLISHED, {}, A4_200_DPI) == ["gundam"]
    assert names(NANO, {}, A4_200_DPI) == ["tiny"]
    odd = ModeRules(own=ResolutionMode(768, 768, False))
    assert odd.choose({}, {}, [A4_200_DPI])[0].mode.base_size == 768
    assert names(odd, {}, A4_200_DPI) == [DEFAULT]


def test_the_request_goes_before_the_server_and_the_server_before_the_checkpoint() -> None:
    assert names(NANO, {}, (9, 9), mode="base") == ["base"]
    assert names(NANO, {"mode": "large"}, (9, 9), mode="base") == ["large"]


def test_every_image_keeps_its_own_mode() -> None:
    request = {"mode": ["small", AUTO, DEFAULT]}
    assert names(NANO, request, (9, 9), (900, 900), (9, 9)) == ["small", "base", "tiny"]


@pytest.mark.parametrize(
    ("longest", "published", "nano"),
    [
        (512, "tiny", "tiny"),
        (513, "tiny", "small"),
        (1024, "tiny", "base"),
        (1280, "small", "large"),
        (1281, "base", "gundam"),
        (2048, "base", "gundam"),
        (2560, "large", "gundam"),
        (2561, "gundam", "gundam"),
    ],
)
def test_auto_is_the_smallest_mode_that_keeps_the_scale(longest: int, published: str, nano: str) -> None:
    for size in ((longest, 1), (1, longest), (longest, longest)):
        assert names(PUBLISHED, {"mode": AUTO}, size) == [published]
        assert names(NANO, {"mode": AUTO}, size) == [nano]


@given(width=st.integers(1, 10_000), height=st.integers(1, 10_000))
def test_auto_never_shrinks_more_than_it_may_while_a_larger_mode_is_left(width: int, height: int) -> None:
    (choice,) = PUBLISHED.choose({"mode": AUTO}, {}, [(width, height)])
    scale = choice.mode.base_size / max(width, height)
    assert choice.name == "gundam" or scale >= PUBLISHED.min_scale


@pytest.mark.parametrize(
    ("request_", "option"),
    [
        ({"mode": "huge"}, "mode"),
        ({"mode": 3}, "mode"),
        ({"mode": ["tiny"]}, "mode"),
        ({"mode": ["tiny", "base", "tiny"]}, "mode"),
        ({"mode": [["tiny"], "base"]}, "mode"),
        ({"mode": "gundam", "max_tiles": 7}, "max_tiles"),
        ({"mode": "gundam", "max_tiles": 10}, "max_tiles"),
        ({"mode": "gundam", "max_tiles": "6"}, "max_tiles"),
        ({"mode": "gundam", "max_tiles": True}, "max_tiles"),
        ({"mode": "gundam", "min_tiles": 5, "max_tiles": 4}, "max_tiles"),
        ({"mode": "gundam", "min_tiles": 0}, "max_tiles"),
        ({"size": 3}, "size"),
    ],
)
def test_options_that_cannot_be_followed_are_refused(request_: dict[str, Any], option: str) -> None:
    with pytest.raises(ModeSelectionError) as caught:
        PUBLISHED.choose(request_, {}, [(9, 9), (9, 9)])
    assert caught.value.option == option


@given(
    request_=st.dictionaries(
        st.sampled_from(["mode", "min_tiles", "max_tiles", "other"]),
        st.one_of(st.sampled_from(NAMES), st.integers(), st.none(), st.lists(st.sampled_from(NAMES)), st.text()),
    )
)
def test_any_options_give_modes_or_a_selection_error(request_: dict[str, Any]) -> None:
    try:
        chosen = PUBLISHED.choose(request_, {"max_tiles": 9}, [(2000, 3000)])
    except ModeSelectionError:
        return
    _, largest = PUBLISHED.largest({"max_tiles": 9})
    assert chosen[0].mode.num_tokens(2000, 3000) <= largest.num_tokens(*largest.largest_page())


def test_a_server_with_more_tiles_cuts_a_page_finer() -> None:
    page = (3000, 3000)
    few, many = (PUBLISHED.choose({}, {"max_tiles": most}, [page])[0].mode.tile_grid(*page) for most in (6, 9))
    assert (few.num_tiles, many.num_tiles) == (4, 9)


def test_every_detail_of_openais_has_a_mode() -> None:
    assert MODE_FOR_DETAIL == {"low": "small", "high": "gundam", "auto": "auto"}
