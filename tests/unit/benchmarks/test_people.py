"""What users do, and what their requests look like."""

from __future__ import annotations

import json
from collections import Counter
from random import Random

import pytest

from benchmarks.load.bodies import build_body
from benchmarks.load.people import MANNERS, Habits, Manner, Step, plan_visit

DEFAULT = Habits()


def visits(number: int, habits: Habits = DEFAULT) -> list[list[Step]]:
    return [list(plan_visit(habits, Random(index))) for index in range(number)]


def test_users_have_the_manners_of_the_table() -> None:
    counts = Counter(steps[0].manner for steps in visits(5000))
    for manner, part in MANNERS:
        assert counts[manner] / 5000 == pytest.approx(part, abs=0.03)


def test_pages_and_thinking_have_the_means_asked_for() -> None:
    found = [steps for steps in visits(4000, Habits(3.0, 2.0)) if steps[0].manner is not Manner.TEXT]
    assert sum(map(len, found)) / len(found) == pytest.approx(3, rel=0.1)
    thinking = [step.think_s for steps in found for step in steps[1:]]
    assert sum(thinking) / len(thinking) == pytest.approx(2, rel=0.1)
    assert all(steps[0].think_s == 0 for steps in found)


@pytest.mark.parametrize("manner", Manner)
def test_a_body_asks_for_what_its_user_takes(manner: Manner) -> None:
    body = json.loads(build_body("nano", Step(manner, 3, "Free OCR.", 64, 5, 0.0)))
    kinds = [part["type"] for part in body["messages"][0]["content"]]
    assert kinds == (["text"] if manner is Manner.TEXT else ["image_url", "text"])
    assert body.get("stream", False) is (manner is not Manner.WHOLE)
