"""A plan as it is printed: lines that say how they were computed and how far they can be trusted. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from serving.planning.figures import Basis, Figures, PlanFigure, weakest


@dataclass(frozen=True, slots=True)
class PlanLine:
    """One result."""

    key: str
    what: str
    value: float
    unit: str
    basis: Basis
    """That of the weakest number that went into it."""
    how: str
    """The computation in words."""
    rests_on: tuple[str, ...]
    """Keys of figures and of other lines."""

    @property
    def is_extrapolated(self) -> bool:
        """Whether something in it was neither measured here nor given."""
        return self.basis in (Basis.PUBLISHED, Basis.ASSUMED)


@dataclass(slots=True)
class PlanSheet:
    """Lines in their order, over the figures that they use."""

    figures: Figures
    lines: dict[str, PlanLine] = field(default_factory=dict)
    used: dict[str, PlanFigure] = field(default_factory=dict)

    def __getitem__(self, key: str) -> float:
        """A line's value, or a figure's."""
        return self.lines[key].value if key in self.lines else self.figures.value(key)

    def use(self, figure: PlanFigure) -> None:
        """A figure that is in no file: lines may rest on it."""
        self.used[figure.key] = figure

    def add(self, key: str, what: str, value: float, unit: str, how: str, *rests_on: str) -> float:
        """Put a result down; its basis comes from what it rests on. Gives its value."""
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
