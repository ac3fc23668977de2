"""Images that users bring (to start from, for a ControlNet or an IP-Adapter), as 8-bit RGB."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ..errors import SettingsError
from ..files import file_state

DEEP = ("I;16", "I;16B", "I;16L", "I;16N", "I")
"""Modes of grey images with 16 bits; "I" is what some releases of Pillow make of them."""


def read_input_image(path: str | Path) -> Image.Image:
    """Read an image as a person sees it.

    It is turned as its camera was held (EXIF), 16-bit greys are scaled to 8 bits, and transparent
    pixels show white.

    Args:
        path: Of the file. It is read again only when it has changed.

    Returns:
        The image, ``RGB`` with 8 bits a channel.

    Raises:
        SettingsError: If it cannot be read, has several frames, or more than 16 bits a channel.
    """
    try:
        state = file_state(path)
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path}: cannot be read ({_reason(error)})") from None
    return _read(str(path), state).copy()


@lru_cache(maxsize=8)
def _read(path: str, _state: tuple[int, ...]) -> Image.Image:
    try:
        with Image.open(path) as image:
            # The other frames of a phone's MPO are previews of the first.
            frames = getattr(image, "n_frames", 1)
            if image.format != "MPO" and frames > 1:
                raise SettingsError(f"{path}: has {frames} frames; give a single image")
            return _eight_bits(_upright(image), path)
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        if isinstance(error, SettingsError):
            raise
        raise SettingsError(f"{path}: cannot be read ({_reason(error)})") from None


def _upright(image: Image.Image) -> Image.Image:
    image.load()  # a PNG may tell its orientation after the pixels
    turned: Image.Image = ImageOps.exif_transpose(image)
    return turned


def _eight_bits(image: Image.Image, path: str) -> Image.Image:
    if image.mode in DEEP:
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise SettingsError(f"{path}: has more than 16 bits a channel; save it with 8 or 16")
        grey = (values / 257).round().astype(np.uint8)
        grey[values == image.info.get("transparency", -1)] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.mode == "F":
        raise SettingsError(f"{path}: has floating-point pixels; save it with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or "not an image"
