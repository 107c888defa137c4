from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from serving.billing.prices import Price
from serving.cluster.directory import ReplicaRecord, ReplicaState
from serving.router.lookups.model_cards import build_cards
from serving.settings.stack import ModelSettings

MODEL = ModelSettings(checkpoint="a/b", aliases=("c",), engine_args={"revision": "abc"})
PRICE = Price(30_000, 1_234_567, cached_picodollars=0, image_picodollars=10_000)
REPLICA = ReplicaRecord(
    "r", "b", "http://r", ReplicaState.READY, max_model_len=8192, image_config=(("modes", ("tiny",)),)
)


def card(*replicas: ReplicaRecord) -> dict[str, Any]:
    cards = build_cards("b", MODEL, PRICE, replicas, 1)
    assert [each.pop("id") for each in cards] == ["b", "c"]
    assert cards[0] == cards[1]
    return cards[0]


def test_a_card_has_the_fields_that_aggregators_read() -> None:
    found = card(REPLICA, dataclasses.replace(REPLICA, max_model_len=4096))
    assert (found["context_length"], found["max_completion_tokens"], found["revision"]) == (4096, 4096, "abc")
    assert found["pricing"] == {
        "prompt": "0.00000003",
        "completion": "0.000001234567",
        "input_cache_read": "0",
        "image_token": "0.00000001",
        "request": "0",
        "image": "0",
    }
    assert found["architecture"]["modality"] == "text+image->text"
    assert found["input_modalities"] == ["text", "image"]
    assert found["modes"] == ["tiny"]


@pytest.mark.parametrize(
    ("replicas", "modes", "inputs"),
    [
        ((), ["tiny", "small", "base", "large", "gundam"], ["text", "image"]),
        ((dataclasses.replace(REPLICA, image_config=None),), [], ["text"]),
    ],
)
def test_a_card_says_what_is_known(replicas: tuple[ReplicaRecord, ...], modes: list[str], inputs: list[str]) -> None:
    found = card(*replicas)
    assert (found["modes"], found["input_modalities"]) == (modes, inputs)
