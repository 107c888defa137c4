"""The numbers that a plan starts from, each with where it comes from and how far it can be trusted.

`figures.json` beside this file holds them. Those from `benchmarks/results/` are compared with it in the tests, so they
cannot drift apart; a file with the same form given to `serving plan --figures` takes the place of any of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from enum import StrEnum
from importlib import resources
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from serving.errors import SettingsError
from serving.settings.base import Frozen


class Basis(StrEnum):
    """How a number is known, the best first."""

    EXACT = "exact"
    """A rule of the code or of the published architecture."""
    GIVEN = "given"
    """By whoever asks."""
    MEASURED = "measured"
    """By a benchmark of this repository, on the machine that is named."""
    PUBLISHED = "published"
    """By others, on their hardware; not repeated here."""
    ASSUMED = "assumed"
    """Nobody has measured it: give your own."""


_TRUST = tuple(Basis)
_MAY_BE_ZERO = frozenset(
    {
        "output_spread",
        "streamed_share",
        "spare_nodes",
        "spare_routers",
        "gpu_hour_dollars",
        "core_hour_dollars",
        "input_dollars",
        "output_dollars",
        "prompt_text_tokens",
    }
)
_AT_MOST_ONE = frozenset({"max_utilisation", "cpu_utilisation", "streamed_share"})


class PlanFigure(Frozen):
    """One number."""

    key: Annotated[str, Field(min_length=1)]
    value: float
    unit: str
    basis: Basis
    source: Annotated[str, Field(min_length=1)]
    """Where it comes from, in words."""
    file: str = ""
    """A result of a benchmark, from the repository's root; empty for figures that are in none."""
    measure: str = ""
    """Its row in there."""
    scale: float = 1.0
    """What the row's value is multiplied with."""


_FIGURES = TypeAdapter(tuple[PlanFigure, ...])


class Figures:
    """Figures by key."""

    def __init__(self, figures: Iterable[PlanFigure]) -> None:
        self._figures = {figure.key: figure for figure in figures}

    def __getitem__(self, key: str) -> PlanFigure:
        return self._figures[key]

    def value(self, key: str) -> float:
        return self._figures[key].value

    def with_values(self, given: Mapping[str, float | None]) -> Figures:
        """The same with numbers that somebody gave in the place of ours; None leaves one as it is.

        Raises:
            SettingsError: a key that no plan asks for, or a number that it cannot be.
        """
        self._check_keys(given)
        for key, value in given.items():
            if value is not None:
                _check_value(key, value)
        changed = {
            key: self._figures[key].model_copy(
                update={"value": value, "basis": Basis.GIVEN, "source": "your own", "file": "", "measure": ""}
            )
            for key, value in given.items()
            if value is not None
        }
        return Figures({**self._figures, **changed}.values())

    def with_figures(self, others: Iterable[PlanFigure]) -> Figures:
        """The same with others in the place of those with their keys.

        Raises:
            SettingsError: a key that no plan asks for.
        """
        new = {figure.key: figure for figure in others}
        self._check_keys(new)
        for key, figure in new.items():
            _check_value(key, figure.value)
        return Figures({**self._figures, **new}.values())

    def _check_keys(self, keys: Iterable[str]) -> None:
        if unknown := [key for key in keys if key not in self._figures]:
            raise SettingsError(f"no figure is called {', '.join(unknown)}; there are {', '.join(self._figures)}")


def _check_value(key: str, value: float) -> None:
    is_fine = math.isfinite(value) and (value >= 0 if key in _MAY_BE_ZERO else value > 0)
    if not is_fine or (key in _AT_MOST_ONE and value > 1):
        raise SettingsError(f"{key} cannot be {value:g}")


def weakest(bases: Iterable[Basis]) -> Basis:
    """What a number is that was computed from others: as good as the worst of them."""
    return max(bases, key=_TRUST.index, default=Basis.EXACT)


def load_figures(file: Path | None = None) -> Figures:
    """The figures that come with the package, and those of a file in their place.

    Raises:
        SettingsError: the file cannot be read or used.
    """
    ours = Figures(_parse(resources.files("serving.planning").joinpath("figures.json").read_text(), "figures.json"))
    if file is None:
        return ours
    try:
        return ours.with_figures(_parse(file.read_text(), str(file)))
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{file}: cannot be read: {error}") from error


def _parse(text: str, name: str) -> tuple[PlanFigure, ...]:
    try:
        return _FIGURES.validate_python(json.loads(text))
    except ValidationError as error:
        problem = error.errors()[0]
        raise SettingsError(f"{name}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}") from error
    except ValueError as error:
        raise SettingsError(f"{name}: is not JSON: {error}") from error
