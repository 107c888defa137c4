"""The training recipes: what pages are drawn when, in which sizes, and how fast the model learns."""

import math
from dataclasses import dataclass, field, replace

from serving.nano.pages import CORE, WIDE, PageSpec
from serving.nano.training.losses import LossWeights


@dataclass(frozen=True)
class View:
    """A size that pages are also trained at, with its share of the steps."""

    side_px: int
    share: float
    pages: int


@dataclass(frozen=True)
class Plan:
    """The recipe. Progress runs from 0 to 1 over the budget.

    The defaults train from nothing. `CONTINUED` improves trained weights and teaches the other views.
    """

    seed: int = 0
    batch_pages: int = 16
    peak_rate: float = 8e-4
    floor_share: float = 0.03
    warmup_steps: int = 150
    heads_steps: int = 0
    """First steps in which only the read-outs are trained, for weights that come without them."""
    heads_rate: float = 3e-3
    decay_from: float = 0.55
    encoder_until: float = 0.03
    encoder_every: int = 1
    wide_from: float = 0.58
    wide_share: float = 0.3
    gap_share: float = 0.0
    spaced_share: float = 0.0
    full_share: float = 0.0
    mistake_share: float = 0.0
    """Share of the printed characters that the decoder is told wrongly while it learns to go on from them."""
    weight_decay: float = 0.02
    average_decay: float = 0.0
    """What is left, after a step, of the running mean of the weights that are measured and shipped; 0 for none."""
    views: tuple[View, ...] = ()
    core: PageSpec = CORE
    wide: PageSpec = WIDE
    measured_chars: tuple[int, int] = (100, 350)
    weights: LossWeights = field(default_factory=LossWeights)


CONTINUED = Plan(
    seed=6,
    batch_pages=8,
    peak_rate=1.5e-4,
    floor_share=0.02,
    warmup_steps=40,
    heads_steps=80,
    decay_from=0.4,
    encoder_until=0.0,
    wide_from=0.0,
    wide_share=0.3,
    gap_share=0.1,
    spaced_share=0.35,
    full_share=0.25,
    mistake_share=0.03,
    average_decay=0.995,
    views=(View(1024, 0.2, 4),),
    weights=LossWeights(line_turn=1.0, end_turn=1.0, end_label=2.0),
)
"""A later stretch, on weights that already read pages at the native size: wide gaps and a larger view."""


@dataclass
class Clock:
    """How far a run is: steps and seconds done, against the budget of either."""

    max_steps: int
    max_seconds: float
    step: int = 0
    seconds: float = 0.0

    @property
    def progress(self) -> float:
        """Share of the budget that is used up, whichever budget is further."""
        return max(self.step / self.max_steps, self.seconds / self.max_seconds)


def learning_rate(plan: Plan, step: int, progress: float) -> float:
    """Return the rate: a short warm-up, a plateau, then half a cosine down to the floor."""
    decay = min(1.0, max(0.0, (progress - plan.decay_from) / (1 - plan.decay_from)))
    share = plan.floor_share + (1 - plan.floor_share) * 0.5 * (1 + math.cos(math.pi * decay))
    return plan.peak_rate * share * min(1.0, (step + 1 - plan.heads_steps) / plan.warmup_steps)


def view_of(step: int, plan: Plan) -> View | None:
    """Return the view of a step, None for the native one; any stretch of steps has the plan's shares."""
    if step < plan.heads_steps:
        return None
    place = step * 0.618034 % 1
    for view in plan.views:
        if place < view.share:
            return view
        place -= view.share
    return None


def training_spec(index: int, plan: Plan, progress: float) -> PageSpec:
    """Return what page number `index` may look like at this progress; every second page is a long one."""
    is_wide = progress >= plan.wide_from and (index * 0.618034) % 1 < plan.wide_share
    return _sometimes_long(plan.wide if is_wide else plan.core, index, plan)


def view_spec(index: int, plan: Plan) -> PageSpec:
    """Return what a page of another view may look like: a core page."""
    return _sometimes_long(plan.core, index, plan)


def _sometimes_long(spec: PageSpec, index: int, plan: Plan) -> PageSpec:
    spec = replace(spec, gap_share=plan.gap_share, spaced_share=plan.spaced_share, full_share=plan.full_share)
    most = spec.num_lines[1]
    return replace(spec, num_lines=((most + 1) // 2, most)) if index % 2 else spec
