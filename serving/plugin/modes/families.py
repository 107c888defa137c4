"""The model families that vLLM 0.32 has for pages, and what sets each apart. Pure.

DeepSeek-OCR is served by this plugin's own model and processor, in every resolution mode. The others are served by
vLLM's own code, which reads pages in one mode; the plugin adds the n-gram guard with the family's published rule and
the loop stop, and routers count its tokens and name its mode by the same table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from serving.plugin.modes.resolution import ResolutionMode


@dataclass(frozen=True, slots=True)
class ModelFamily:
    """A family of checkpoints with one architecture."""

    name: str
    architecture: str
    """As in a checkpoint's `config.json`."""
    own: ResolutionMode = field(default_factory=ResolutionMode)
    """The mode of a checkpoint that says nothing else."""
    is_fixed: bool = False
    """Whether it reads pages only in its own mode."""
    tiles_single_pages: bool = False
    """Whether the pages of a request with several are not tiled."""
    ngram_size: int = 30
    """Of the no-repeat-n-gram rule that is published with it."""
    ngram_window: int = 90

    def rules_config(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return image settings for `ModeRules.from_config`.

        Args:
            settings: the checkpoint's own, which vLLM's code for the other families does not read.
        """
        if not self.is_fixed:
            return dict(settings)
        return {**asdict(self.own), "is_fixed": True, "tiles_single_pages": self.tiles_single_pages}


DEEPSEEK_OCR = ModelFamily("DeepSeek-OCR", "DeepseekOCRForCausalLM")
FAMILIES = {
    family.architecture: family
    for family in (
        DEEPSEEK_OCR,
        ModelFamily(
            "DeepSeek-OCR-2",
            "DeepseekOCR2ForCausalLM",
            ResolutionMode(1024, 768, has_newlines=False),
            is_fixed=True,
        ),
        ModelFamily(
            "Unlimited-OCR",
            "UnlimitedOCRForCausalLM",
            ResolutionMode(1024, 640, max_tiles=32, tiles_limit=32),
            is_fixed=True,
            tiles_single_pages=True,
            ngram_size=35,
            ngram_window=128,
        ),
    )
}
"""By architecture."""


class UnknownFamilyError(ValueError):
    """The checkpoint is of no family in the table."""


def find_family(architectures: Sequence[str] | None) -> ModelFamily:
    """Return the family of a checkpoint.

    Args:
        architectures: those of its `config.json`; the first counts, as for vLLM.

    Raises:
        UnknownFamilyError: it is none of the table's.
    """
    family = FAMILIES.get(architectures[0]) if architectures else None
    if family is None:
        known = ", ".join(f"{known.name} ({known.architecture})" for known in FAMILIES.values())
        found = f"the architecture {architectures[0]}" if architectures else "no architecture"
        raise UnknownFamilyError(f"its config.json names {found}, and pages can be read with {known} only")
    return family
