"""What users do, drawn by chance from a seed. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from random import Random

PROMPTS = (
    ("Free OCR.", 0.7),
    ("<|grounding|>Convert the document to markdown.", 0.2),
    ("<|grounding|>OCR this image.", 0.1),
)
"""The model card's, and how often each is used."""


class Manner(StrEnum):
    STREAM = "stream"
    WHOLE = "whole"
    LEAVES = "leaves"
    """Takes a stream and closes the connection in the middle."""
    TEXT = "text"
    """A stream of text without a page."""


MANNERS = ((Manner.STREAM, 0.55), (Manner.WHOLE, 0.3), (Manner.LEAVES, 0.08), (Manner.TEXT, 0.07))


@dataclass(frozen=True, slots=True)
class Step:
    """One request of a visit."""

    manner: Manner
    page: int
    """Number of a page in the series that is read."""
    prompt: str
    max_tokens: int
    leaves_after: int
    """Events with text that a user who leaves still takes."""
    think_s: float
    """Before it."""


@dataclass(frozen=True, slots=True)
class Habits:
    """Means: geometric for pages, exponential for thinking."""

    pages_per_visit: float = 2.0
    think_s: float = 1.0


def plan_visit(habits: Habits, random: Random) -> Iterator[Step]:
    """The requests of one visit. The first is sent on arrival; a user keeps to one manner."""
    manner = random.choices([manner for manner, _ in MANNERS], [part for _, part in MANNERS])[0]
    think_s = 0.0
    while True:
        yield Step(
            manner=manner,
            page=random.randrange(10**6),
            prompt=random.choices([text for text, _ in PROMPTS], [part for _, part in PROMPTS])[0],
            max_tokens=64 if manner is Manner.TEXT else 400,
            leaves_after=random.randint(1, 40),
            think_s=think_s,
        )
        if manner is Manner.TEXT or random.random() < 1 / habits.pages_per_visit:
            return
        think_s = random.expovariate(1 / habits.think_s) if habits.think_s else 0.0
