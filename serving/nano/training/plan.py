"""The recipe of free print: what is trained when, on which pages, and how fast."""

import math
from dataclasses import dataclass, field, replace
from enum import StrEnum

from serving.nano.training.guides import DecoderWeights
from serving.nano.training.print_pages import FREE, PrintSpec
from serving.nano.training.readout import EncoderWeights


class Stage(StrEnum):
    """What a run is at. Every stage ends by what the model can do, or when its share of the budget is used up."""

    ENCODER = "encoder"
    """The encoder alone, with its read-outs."""
    ALTERNATING = "alternating"
    """Mostly the decoder, on an encoder whose windows stand still; every few steps the encoder."""
    JOINT = "joint"
    """Everything at once."""


@dataclass(frozen=True)
class Plan:
    """The recipe. Progress runs from 0 to 1 over the budget of CPU time."""

    seed: int = 0
    batch_pages: int = 8
    encoder_pages: int = 4
    """Pages of a step in the encoder's own stage."""
    pages: PrintSpec = FREE
    dense_chars: tuple[int, int] = (350, 900)
    """On the pages of the encoder's own steps, which cost the same however much is on a page."""
    text_chars: tuple[int, ...] = (127, 191, 255, 319, 383, 419)
    """At most on the pages of the decoder's steps: one of these for a step, and half of it at least, so that little is
    padded."""
    rate: float = 1.5e-3
    encoder_rate: float = 1.2e-3
    floor_share: float = 0.03
    warmup_steps: int = 50
    decay_from: float = 0.6
    weight_decay: float = 0.02
    clip_norm: float = 1.0
    average_decay: float = 0.99
    """What is left, after a step, of the running mean of the weights that are measured and shipped."""
    encoder_until: float = 0.9
    """Read-out on set A at which the encoder's own stage ends."""
    encoder_share: float = 0.25
    """Of the budget, after which it ends anyway."""
    joint_from: float = 0.9
    """Characters that a decoder told the place gets right, at which all is trained together."""
    joint_share: float = 0.6
    """Of the budget, after which it is anyway."""
    encoder_every: int = 4
    """In the alternating stage, one step in so many is the encoder's."""
    told_share: float = 0.75
    """Of the pages, until all is trained together, for which the decoder is told where the next character is."""
    told_fades: float = 0.25
    """Of the budget, over which that share then goes to nothing."""
    encoder: EncoderWeights = field(default_factory=EncoderWeights)
    decoder: DecoderWeights = field(default_factory=DecoderWeights)

    def spec(self, step: int, *, is_dense: bool) -> PrintSpec:
        """Return what the pages of a step may look like."""
        if is_dense:
            return replace(self.pages, num_chars=self.dense_chars)
        most = self.text_chars[int(step * 0.618034 % 1 * len(self.text_chars))]
        return replace(self.pages, num_chars=(most // 2, most))


@dataclass
class Clock:
    """How far a run is: steps, and seconds of CPU time, against the budget of either."""

    max_steps: int
    max_seconds: float
    step: int = 0
    seconds: float = 0.0

    @property
    def progress(self) -> float:
        """Share of the budget that is used up, whichever budget is further."""
        return max(self.step / self.max_steps, self.seconds / self.max_seconds)


def rate_share(plan: Plan, steps_since_start: int, progress: float) -> float:
    """Return the share of the peak rate: a short warm-up after every start, a plateau, half a cosine to the floor."""
    decay = min(1.0, max(0.0, (progress - plan.decay_from) / (1 - plan.decay_from)))
    share = plan.floor_share + (1 - plan.floor_share) * 0.5 * (1 + math.cos(math.pi * decay))
    return share * min(1.0, (steps_since_start + 1) / plan.warmup_steps)
