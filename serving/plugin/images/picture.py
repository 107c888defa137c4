"""Converts an image opened by Pillow to RGB as displayed: rotated, with square pixels.

Images of chat requests (`decoding`) and pages of documents both use this module.
"""

from __future__ import annotations

from PIL import Image, ImageCms

from serving.plugin.images.geometry import SWAPS_SIDES, orientation_of, pixel_aspect, square_size

Colour = tuple[int, int, int]

_DEEP_MODES = frozenset({"I", "F", "I;16", "I;16L", "I;16B", "I;16N"})
_WITH_ALPHA = frozenset({"RGBA", "LA", "PA"})
_REDUCED = frozenset({"1", "L", "RGB", "CMYK", "YCbCr"})
"""Modes whose values can be averaged as they are."""
_PREMULTIPLIED = {"RGBa": "RGBA", "La": "LA"}
_TURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def show(image: Image.Image, background: Colour, reduction: int = 1) -> Image.Image:
    """Return the image as displayed.

    Args:
        image: as opened, neither decoded nor copied.
        background: colour behind transparent pixels.
        reduction: by which whole number both sides are divided, before anything that would need more memory.
    """
    aspect = pixel_aspect(image)
    image.load()
    orientation = orientation_of(image)
    if reduction > 1 and image.mode in _REDUCED:
        image, reduction = (image.convert("L") if image.mode == "1" else image).reduce(reduction), 1
    image = to_rgb(image, background)
    if reduction > 1:
        image = image.reduce(reduction)
    if orientation in _TURNED:
        image = image.transpose(_TURNED[orientation])
    return make_square(image, aspect, orientation)


def make_square(image: Image.Image, aspect: float, orientation: int) -> Image.Image:
    """Resample the image to square pixels, enlarging the side with the lower resolution.

    Args:
        image: already rotated.
        aspect: width of a pixel divided by its height, before the rotation.
        orientation: the EXIF orientation that was applied.
    """
    if aspect == 1.0:
        return image
    size = square_size(image.size, 1 / aspect if orientation in SWAPS_SIDES else aspect)
    return image.resize(size, Image.Resampling.BICUBIC)


def to_rgb(image: Image.Image, background: Colour) -> Image.Image:
    """Convert an image to 8-bit RGB and blend transparent pixels with the background.

    Args:
        image: not yet rotated or copied: the tags of a TIFF tell what its numbers mean.
        background: shown behind transparent pixels.
    """
    has_key = "transparency" in image.info
    if image.mode == "RGB" and not has_key:
        return image
    if image.mode in _DEEP_MODES:
        # Imported late: ordinary images do not need numpy, and processes that render documents run without it.
        from serving.plugin.images.depth import deep_to_rgb

        return deep_to_rgb(image, background)
    if image.mode == "LAB":
        return _lab_to_rgb(image)
    if image.mode in _PREMULTIPLIED:
        image = image.convert(_PREMULTIPLIED[image.mode])
    if image.mode not in _WITH_ALPHA and not has_key:
        return image.convert("RGB")
    image = image.convert("RGBA")
    flat = Image.new("RGB", image.size, background)
    flat.paste(image, mask=image.getchannel("A"))
    return flat


def _lab_to_rgb(image: Image.Image) -> Image.Image:
    """Convert an L*a*b* image, which Pillow itself converts with colour profiles only."""
    lab, rgb = (ImageCms.createProfile(name) for name in ("LAB", "sRGB"))
    converted = ImageCms.profileToProfile(image, lab, rgb, outputMode="RGB")
    assert converted is not None, "None is for conversion in place"
    return converted
