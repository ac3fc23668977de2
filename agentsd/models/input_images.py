"""Read users' images (initial, ControlNet and IP-Adapter images) as 8-bit RGB."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import SettingsError
from ..files import file_state

DEEP = ("I;16", "I;16B", "I;16L", "I;16N", "I")
"""Modes of 16-bit grey images; some releases of Pillow read them as "I"."""

TIFF_BITS, TIFF_PHOTOMETRIC, BLACK_IS_ZERO = 258, 262, 1
GREY_LEVELS = {"1": 1, "L;2": 3, "L;4": 15}
"""Largest pixel value of grey PNGs by Pillow's raw mode, where it is below 255."""


def read_input_image(path: str | Path) -> Image.Image:
    """Read an image as an image viewer would show it.

    It is rotated as its EXIF orientation says, 16-bit greys are scaled to 8 bits, and transparent
    pixels become white.

    Args:
        path: Of the file; it is read again only if it has changed.

    Returns:
        The image, ``RGB`` with 8 bits a channel.

    Raises:
        SettingsError: If it cannot be read, has several frames, or has pixels whose brightness or
            transparency Pillow does not report.
    """
    try:
        return _read(str(path), file_state(path)).copy()  # a caller may draw on it
    except (OSError, ValueError) as error:
        if isinstance(error, SettingsError):
            raise
        raise SettingsError(f"{path}: cannot be read ({_reason(error)})") from None


@lru_cache(maxsize=8)
def _read(path: str, _state: tuple[int, ...]) -> Image.Image:
    try:
        with Image.open(path) as image:
            # The other frames of a phone's MPO are previews of the first.
            frames = getattr(image, "n_frames", 1)
            if image.format != "MPO" and frames > 1:
                raise SettingsError(f"{path}: has {frames} frames; give a single image")
            _check_levels(image, path)
            transparent = _transparent_value(image, path)
            upright = _upright(image)
            if transparent is not None:
                upright.info["transparency"] = transparent
            return _eight_bits(upright, path)
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        if isinstance(error, SettingsError):
            raise
        raise SettingsError(f"{path}: cannot be read ({_reason(error)})") from None


def fitted_size(
    image: Image.Image | None, height: int | None, width: int | None
) -> tuple[int, int] | None:
    """The common width and height that input images are resized to.

    If one side is given, the other preserves the image's proportions; if neither is, the image
    keeps its own size, rounded down to a multiple of 8, as models require.
    """
    if height is not None and width is not None:
        return width, height
    if image is None:
        return None
    if height is not None or width is not None:
        tall = height or _multiple_of_8((width or 0) * image.height / image.width)
        wide = width or _multiple_of_8((height or 0) * image.width / image.height)
        return wide, tall
    return image.width // 8 * 8 or 8, image.height // 8 * 8 or 8


def _multiple_of_8(side: float) -> int:
    return max(8, round(side / 8) * 8)


def _upright(image: Image.Image) -> Image.Image:
    image.load()  # in a PNG, the orientation may come after the pixels
    turned: Image.Image = ImageOps.exif_transpose(image)
    return turned


def _check_levels(image: Image.Image, path: str) -> None:
    """Reject grey TIFFs whose values do not range from black at 0 to white at 65535.

    Raises:
        SettingsError: If it is one.
    """
    if image.format != "TIFF" or image.mode not in DEEP:
        return
    tags = image.tag_v2  # type: ignore[attr-defined]
    sixteen = image.mode != "I" and tags.get(TIFF_BITS) == (16,)
    if not sixteen or tags.get(TIFF_PHOTOMETRIC) != BLACK_IS_ZERO:
        raise SettingsError(
            f"{path}: is a grey TIFF with signed, inverted or 12-bit values, or with more than 16 "
            "bits per channel; save it as PNG"
        )


def _transparent_value(image: Image.Image, path: str) -> int | None:
    """The transparent grey value of a PNG, on the scale of Pillow's pixels.

    Raises:
        SettingsError: If it is a colour with 16 bits per channel, of which Pillow reads only 8.
    """
    value, raw = image.info.get("transparency"), _raw_mode(image)
    if value is None or image.format != "PNG":
        return None
    if raw == "RGB;16B":
        raise SettingsError(
            f"{path}: has a transparent 16-bit colour; save it with an alpha channel"
        )
    if raw in GREY_LEVELS and value <= GREY_LEVELS[raw]:
        return int(value) * 255 // GREY_LEVELS[raw]
    return value if isinstance(value, int) else None


def _raw_mode(image: Image.Image) -> str:
    tile = getattr(image, "tile", None)
    return str(tile[0][3]) if tile else ""


def _eight_bits(image: Image.Image, path: str) -> Image.Image:
    if image.mode in DEEP:
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise SettingsError(f"{path}: has more than 16 bits per channel; save it with 8 or 16")
        grey = (values / 257).round().astype(np.uint8)
        grey[values == image.info.get("transparency", -1)] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.mode == "F":
        raise SettingsError(f"{path}: has floating-point pixels; save it with 8 or 16 bits")
    if image.has_transparency_data:
        image = (image.convert("L") if image.mode == "1" else image).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image that Pillow can read, such as PNG, JPEG, WebP or TIFF"
    return getattr(error, "strerror", None) or "not an image"
