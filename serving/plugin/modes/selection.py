"""Chooses the resolution mode of each image of a request. Pure; the router uses it too, to report an answer's modes.

A request chooses with vLLM's `mm_processor_kwargs`: `{"mode": "base"}` for all of its images, or a list with one entry
per image. Without a choice the server's default applies, and without that the checkpoint's own mode.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from serving.plugin.modes.resolution import ResolutionMode

# The published modes, fewest tokens first (DeepSeek-OCR paper, table 1).
MODES = {
    "tiny": ResolutionMode(512, 512, False),
    "small": ResolutionMode(640, 640, False),
    "base": ResolutionMode(1024, 1024, False),
    "large": ResolutionMode(1280, 1280, False),
    "gundam": ResolutionMode(1024, 640, True),
}
AUTO = "auto"
DEFAULT = "default"
"""In a list: the server's default mode for this image."""
NAMES = (*MODES, AUTO, DEFAULT)
MODE_FOR_DETAIL = {"low": "small", "high": "gundam", "auto": AUTO}
"""Modes for the values of OpenAI's `image_url.detail`."""
OPTIONS = frozenset({"mode", "min_tiles", "max_tiles"})

Size = tuple[int, int]
"""Width and height of a page in pixels."""


class ModeSelectionError(ValueError):
    """The options are invalid; `option` names the invalid one."""

    def __init__(self, message: str, option: str) -> None:
        super().__init__(message)
        self.option = option


@dataclass(frozen=True, slots=True)
class ChosenMode:
    """The mode of one image."""

    name: str
    """A name in `MODES`, or `default` for a checkpoint whose own mode has no name."""
    mode: ResolutionMode


@dataclass(frozen=True, slots=True)
class ModeRules:
    """The checkpoint's rules for modes."""

    own: ResolutionMode
    """The checkpoint's mode."""
    min_scale: float = 0.5
    """`auto` takes the smallest mode that scales the page's longer side by at least this factor.

    0.5 keeps 10-point text of a 200 dpi scan at 14 pixels. The checkpoint may set another (`auto_min_scale`) for a
    model that reads smaller text or needs larger.
    """

    is_fixed: bool = False
    """Whether pages are read in the checkpoint's mode only (`serving.plugin.modes.families`)."""
    tiles_single_pages: bool = False
    """Whether the pages of a request with several are not tiled."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModeRules:
        """Read a checkpoint's image settings (`serving.plugin.modes.image_config`)."""
        own, min_scale = ResolutionMode.from_config(config), config.get("auto_min_scale", 0.5)
        return cls(own, min_scale, config.get("is_fixed", False), config.get("tiles_single_pages", False))

    def as_config(self) -> tuple[tuple[str, Any], ...]:
        """Return all rules, including those that the checkpoint leaves out, as items for `from_config`."""
        family = (("is_fixed", self.is_fixed), ("tiles_single_pages", self.tiles_single_pages))
        return (("auto_min_scale", self.min_scale), *family, *asdict(self.own).items())

    def choose(self, request: Mapping[str, Any], server: Mapping[str, Any], sizes: Sequence[Size]) -> list[ChosenMode]:
        """Return the mode of every image of a request.

        Args:
            request: the request's own `mm_processor_kwargs`.
            server: the server's: the defaults, whose `max_tiles` is also the largest that a request may set.
            sizes: the sizes of the request's images, in order.

        Raises:
            ModeSelectionError: an option is unknown, of the wrong type or out of range.
        """
        options = {**server, **request}
        if self.is_fixed:
            return self._choose_fixed(options, len(sizes))
        unknown = set(options) - OPTIONS
        if unknown:
            raise ModeSelectionError(f"only {', '.join(sorted(OPTIONS))} can be set for this model", min(unknown))
        names = _names(options.get("mode", DEFAULT), len(sizes))
        chosen = [self._named(name, size, options) for name, size in zip(names, sizes, strict=True)]
        most = server.get("max_tiles", self.own.max_tiles)
        if any(choice.mode.max_tiles > most for choice in chosen if choice.mode.crop_mode):
            raise ModeSelectionError(f"max_tiles must be at most {most} on this server", "max_tiles")
        return chosen

    def _choose_fixed(self, options: Mapping[str, Any], num_pages: int) -> list[ChosenMode]:
        """Return the only mode for every page: without tiles where the family tiles single pages only."""
        if options:
            raise ModeSelectionError("this model reads pages in one mode, which cannot be chosen", min(options))
        mode = self.own
        if self.tiles_single_pages and num_pages > 1:
            mode = replace(mode, crop_mode=False)
        return [ChosenMode("gundam" if mode.crop_mode else "base", mode)] * num_pages

    def _named(self, name: str, size: Size, options: Mapping[str, Any]) -> ChosenMode:
        if name == AUTO:
            name = self._smallest_legible(size)
        mode = self.own if name == DEFAULT else MODES[name]
        if mode.crop_mode:
            mode = _with_tiles(mode, options, self.own)
        if name == DEFAULT:
            bare = (mode.base_size, mode.image_size, mode.crop_mode)
            same = (key for key, known in MODES.items() if (known.base_size, known.image_size, known.crop_mode) == bare)
            name = next(same, DEFAULT)
        return ChosenMode(name, mode)

    def _smallest_legible(self, size: Size) -> str:
        needed = self.min_scale * max(size)
        untiled = (name for name, mode in MODES.items() if not mode.crop_mode and mode.base_size >= needed)
        return next(untiled, "gundam")

    def largest(self, server: Mapping[str, Any]) -> tuple[str, ResolutionMode]:
        """Return the name and the mode with the most tokens among those that a request may choose."""
        modes = {name: self._named(name, (1, 1), server).mode for name in (DEFAULT, *MODES)}
        return max(modes.items(), key=lambda named: named[1].num_tokens(*named[1].largest_page()))


def _names(mode: Any, num_images: int) -> Sequence[str]:
    names = mode if isinstance(mode, list | tuple) else [mode] * num_images
    if len(names) != num_images:
        raise ModeSelectionError(f"mode has {len(names)} entries, but the request has {num_images} images", "mode")
    for name in names:
        if not isinstance(name, str) or name not in NAMES:
            raise ModeSelectionError(f"mode must be one of {', '.join(NAMES)}", "mode")
    return names


def _with_tiles(mode: ResolutionMode, options: Mapping[str, Any], own: ResolutionMode) -> ResolutionMode:
    bounds = {key: options.get(key, getattr(own, key)) for key in ("min_tiles", "max_tiles")}
    for key, value in bounds.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise ModeSelectionError(f"{key} must be a whole number", key)
    try:
        return replace(mode, **bounds)
    except ValueError as error:
        raise ModeSelectionError(str(error), "max_tiles") from error
