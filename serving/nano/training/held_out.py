"""The sets that a run is judged by while it trains: pages of words, and for U and D of fonts, that it never sees.

They are drawn by training's own renderer. What a checkpoint is judged by in the end is drawn by another one, in
`benchmarks.nano_accuracy`.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from serving.nano.print_tokens import decode_ids
from serving.nano.training.batches import OCR_PROMPT, SPACE, Batch
from serving.nano.training.fonts import MONO, MONO_CORE, PROPORTIONAL, UNSEEN
from serving.nano.training.metrics import mean_error_rate
from serving.nano.training.model import NanoOcr
from serving.nano.training.print_pages import FREE, PrintPage, PrintSpec, sample_print
from serving.nano.training.readout import Readouts, ask

_CLEAN = replace(
    FREE,
    font_shares=(1.0,),
    fonts=((MONO_CORE,),),
    num_chars=(60, 350),
    noise_share=0.0,
    jpeg_share=0.0,
    blur_share=0.0,
    turned_share=0.0,
    ruled_share=0.0,
    hinted_share=1.0,
)
SETS: dict[str, PrintSpec] = {
    "A": replace(_CLEAN, sizes_px=(26, 26)),
    "B": replace(_CLEAN, fonts=(MONO[:2],), sizes_px=(18, 28), noise_share=0.5),
    "C": replace(_CLEAN, fonts=(PROPORTIONAL,)),
    "U": replace(_CLEAN, fonts=(UNSEEN[:1],)),
}
"""DejaVu Sans Mono at 26 px; also bold, 18 to 28 px, with noise; proportional fonts; a font never seen, Noto Sans."""
_SEED = 1
_BATCH_PAGES = 8


@dataclass(frozen=True)
class HeldOut:
    """A set, and its pages as batches."""

    name: str
    pages: list[PrintPage]
    batches: list[Batch]

    @classmethod
    def draw(cls, name: str, num_pages: int, side_px: int) -> "HeldOut":
        """Draw the first pages of a set, `side_px` pixels a side."""
        spec = replace(SETS[name], side_px=side_px)
        pages = [sample_print(spec, "test", _SEED, index) for index in range(num_pages)]
        random = np.random.default_rng(_SEED)
        parts = [pages[start : start + _BATCH_PAGES] for start in range(0, num_pages, _BATCH_PAGES)]
        return cls(name, pages, [Batch.from_pages(part, random) for part in parts])


def error_rate(model: NanoOcr, held_out: HeldOut, num_pages: int = 4) -> float:
    """Return the mean character error rate of the set's first pages, read greedily."""
    pages = held_out.pages[:num_pages]
    views = torch.from_numpy(np.stack([page.pixels for page in pages]))
    longest = max(len(page.text) for page in pages)
    texts = [decode_ids(ids) for ids in model.generate(views, OCR_PROMPT, longest + 32)]
    return mean_error_rate(texts, [page.text for page in pages])


@torch.no_grad()
def read_out(model: NanoOcr, readouts: Readouts, held_out: HeldOut) -> tuple[float, float]:
    """Return the shares of printed characters read right from vision tokens and from patches, given true centres."""
    right = np.zeros(2)
    count = 0
    for batch in held_out.batches:
        encoded = model.encode(batch.pages)
        asked = ask(batch, model.sizes, is_noisy=False)
        is_print = (asked.weight > 0) & (asked.wanted < SPACE)
        for index, logits in enumerate(
            (readouts.read_cells(encoded.cells, asked)[0], readouts.read_patches(encoded.patches, asked))
        ):
            right[index] += int(((logits.argmax(-1) == asked.wanted) & is_print).sum())
        count += int(is_print.sum())
    cells, patches = (right / max(count, 1)).tolist()
    return cells, patches
