"""The input figures of a plan, each with its source and how reliable it is.

They are stored in `figures.json` beside this file. Tests compare those that come from `benchmarks/results/` with the
results. A file of the same format given to `serving plan --figures` replaces any of them.
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
    """How a figure is known, most reliable first."""

    EXACT = "exact"
    """Follows from the code or the published architecture."""
    GIVEN = "given"
    """Given by the user."""
    MEASURED = "measured"
    """Measured by a benchmark of this repository on the named machine."""
    PUBLISHED = "published"
    """Published by others for their hardware; not reproduced here."""
    ASSUMED = "assumed"
    """Assumed, not measured: give your own."""


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
    """One figure."""

    key: Annotated[str, Field(min_length=1)]
    value: float
    unit: str
    basis: Basis
    source: Annotated[str, Field(min_length=1)]
    """Where it comes from."""
    file: str = ""
    """File of the benchmark's result, relative to the repository's root; empty for other figures."""
    measure: str = ""
    """Its row in that file."""
    scale: float = 1.0
    """Factor from the row's value to this figure."""


_FIGURES = TypeAdapter(tuple[PlanFigure, ...])


class Figures:
    """Figures by key."""

    def __init__(self, figures: Iterable[PlanFigure]) -> None:
        self._figures = {figure.key: figure for figure in figures}

    def __len__(self) -> int:
        return len(self._figures)

    def __getitem__(self, key: str) -> PlanFigure:
        return self._figures[key]

    def value(self, key: str) -> float:
        return self._figures[key].value

    def with_values(self, given: Mapping[str, float | None]) -> Figures:
        """Return the figures with some replaced by the user's values; None leaves a figure unchanged.

        Raises:
            SettingsError: no plan uses a key, or a value is out of range.
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
        """Return the figures with some replaced by others with the same keys.

        Raises:
            SettingsError: no plan uses a key.
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
    """Return the basis of a computed number: the least reliable of its inputs."""
    return max(bases, key=_TRUST.index, default=Basis.EXACT)


def load_figures(file: Path | None = None) -> Figures:
    """Load the package's figures, with those in the given file replacing them.

    Raises:
        SettingsError: the file cannot be read or is invalid.
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
