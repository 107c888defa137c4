"""A plan as lines that record how they were computed and how reliable they are. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from serving.planning.figures import Basis, Figures, PlanFigure, weakest


@dataclass(frozen=True, slots=True)
class PlanLine:
    """One result of a plan."""

    key: str
    what: str
    value: float
    unit: str
    basis: Basis
    """The basis of its least reliable input."""
    how: str
    """The formula in words."""
    rests_on: tuple[str, ...]
    """Keys of the figures and lines that it depends on."""

    @property
    def is_extrapolated(self) -> bool:
        """Whether an input was neither measured here nor given by the user."""
        return self.basis in (Basis.PUBLISHED, Basis.ASSUMED)


@dataclass(slots=True)
class PlanSheet:
    """The lines in order, and the figures that they use."""

    figures: Figures
    lines: dict[str, PlanLine] = field(default_factory=dict)
    used: dict[str, PlanFigure] = field(default_factory=dict)

    def __getitem__(self, key: str) -> float:
        """Return the value of a line or a figure."""
        return self.lines[key].value if key in self.lines else self.figures.value(key)

    def use(self, figure: PlanFigure) -> None:
        """Add a figure that is in no file, so that lines may depend on it."""
        self.used[figure.key] = figure

    def add(self, key: str, what: str, value: float, unit: str, how: str, *rests_on: str) -> float:
        """Add a result, whose basis follows from its inputs, and return its value."""
        bases = []
        for name in rests_on:
            if name in self.lines:
                bases.append(self.lines[name].basis)
            else:
                figure = self.used.get(name) or self.figures[name]
                self.used[name] = figure
                bases.append(figure.basis)
        self.lines[key] = PlanLine(key, what, value, unit, weakest(bases), how, rests_on)
        return value
