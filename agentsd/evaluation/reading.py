"""An image to measure, from the bytes of its file: what is refused, and how the rest is read."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from PIL import ExifTags, Image, ImageOps

from ..errors import EvaluationError


@dataclass(frozen=True)
class Reading:
    """How images are read: turned as their cameras say; nothing else is changed silently.

    Args:
        size: Crop to a centred square and resize it (Lanczos, smoothed) to this many pixels;
            ``None`` takes images as they are, which must then be of one size.
        convert: Turn grey, palette, CMYK and transparent images to RGB, and take the first of
            several frames, as pytorch-fid does: transparency is dropped. Without it, they are
            errors.
        skip_bad: Leave out images that cannot be used, and report them, rather than stop.
    """

    size: int | None = None
    convert: bool = False
    skip_bad: bool = False

    @property
    def manner(self) -> str:
        """What it makes of an image, for the keys of caches."""
        return f"-upright-{self.size}-{'rgb' if self.convert else ''}"


def opened(name: str, data: bytes, reading: Reading) -> Image.Image:
    """Open an image, check what its header tells, and turn it as its camera was held.

    It is not decoded yet, unless it is turned.

    Raises:
        EvaluationError: If it is none, has more than 8 bits a channel, or is not a single opaque
            RGB image and may not be converted.
    """
    try:
        image = Image.open(BytesIO(data))
        # The other frames of a phone's MPO are previews of the first.
        several = image.format != "MPO" and getattr(image, "is_animated", False)
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise EvaluationError(f"{name}: no image that can be read ({_first(error)})") from None
    if image.mode.startswith(("I", "F")) or any(map(_is_deep, getattr(image, "tile", ()))):
        raise EvaluationError(f"{name}: has more than 8 bits a channel; save it with 8")
    if not reading.convert:
        if several:
            raise EvaluationError(f"{name}: has several frames; --convert takes the first")
        if image.mode != "RGB":
            raise EvaluationError(
                f"{name}: is {image.mode}, not RGB; --convert takes it as pytorch-fid does"
            )
        if image.has_transparency_data:
            raise EvaluationError(f"{name}: has a transparent colour; --convert drops it")
    return _upright(name, image, data)


def _is_deep(tile: Any) -> bool:
    """Whether a part of an image is decoded from more than 8 bits, which Pillow quietly halves."""
    codec, *_, args = tile
    if codec.startswith("ppm"):
        return isinstance(args, tuple) and args[-1] > 255
    return re.search(r"(?<!BGR);16", str(args)) is not None  # BGR;16 has 16 bits for all three


def _upright(name: str, image: Image.Image, data: bytes) -> Image.Image:
    """An image turned as EXIF says; it is decoded for this only if it has to be."""
    # Pillow decodes any PNG to look for EXIF at its end.
    if image.format == "PNG" and not any(mark in data for mark in _EXIF_IN_PNG):
        return image
    with _decoding(name):
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        return ImageOps.exif_transpose(image) if turned else image


_EXIF_IN_PNG = (b"eXIf", b"Raw profile type", b"tiff:Orientation")


def decoded(name: str, image: Image.Image, reading: Reading) -> Image.Image:
    """Decode what :func:`opened` opened, to RGB, at the size that is asked for.

    Raises:
        EvaluationError: If the file is cut short or damaged.
    """
    with _decoding(name):
        rgb = image.convert("RGB")
    if reading.size is None:
        return rgb
    return ImageOps.fit(rgb, (reading.size,) * 2, Image.Resampling.LANCZOS)


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    """Tell what Pillow raises as an error of ours."""
    try:
        yield
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        raise EvaluationError(f"{name}: is damaged or cut short ({_first(error)})") from None


def _first(error: BaseException) -> str:
    text = str(error).replace("<_io.BytesIO object at ", "").split("\n")[0]
    return "unknown format" if text.startswith("cannot identify") else text
