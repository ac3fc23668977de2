"""Read images to measure: which ones are refused, and how the others are decoded."""

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
from .image_sets import ImageEntry


@dataclass(frozen=True)
class ReadOptions:
    """How images are read. They are rotated upright; nothing else is changed silently.

    Args:
        size: Crop to a centred square and resize it (Lanczos, antialiased) to this many pixels;
            ``None`` keeps the size of the images, which must then all be equal.
        convert: Convert greyscale, palette, CMYK and transparent images to RGB, and take the first
            of several frames, as pytorch-fid does: transparency is dropped. Otherwise such images
            are errors.
        skip_bad: Skip images that cannot be used, and report them, instead of raising an error.
    """

    size: int | None = None
    convert: bool = False
    skip_bad: bool = False

    @property
    def cache_suffix(self) -> str:
        """The part of a cache key that identifies these options."""
        return f"-upright-{self.size}-{'rgb' if self.convert else ''}"


def read_image(entry: ImageEntry, options: ReadOptions) -> tuple[Image.Image, str]:
    """Read an image of a set.

    Returns:
        The image in RGB, and the SHA-256 of its file.

    Raises:
        EvaluationError: If the file has changed, is damaged, or is an image that the options
            refuse.
    """
    data, digest = entry.read_verified()
    return decode_image(entry.name, open_image(entry.name, data, options), options), digest


def open_image(name: str, data: bytes, options: ReadOptions) -> Image.Image:
    """Open an image, check its header, and rotate it upright.

    The image is only decoded if it has to be rotated.

    Raises:
        EvaluationError: If the data is not an image, has more than 8 bits per channel, or is not a
            single opaque RGB image and may not be converted.
    """
    try:
        image = Image.open(BytesIO(data))
        # The other frames of a phone's MPO are previews of the first.
        has_frames = image.format != "MPO" and getattr(image, "is_animated", False)
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise EvaluationError(f"{name}: not a readable image ({_first_line(error)})") from None
    if image.mode.startswith(("I", "F")) or any(map(_is_deep, getattr(image, "tile", ()))):
        raise EvaluationError(f"{name}: has more than 8 bits per channel; save it with 8")
    if not options.convert:
        if has_frames:
            raise EvaluationError(f"{name}: has several frames; --convert takes the first")
        if image.mode != "RGB":
            raise EvaluationError(
                f"{name}: is {image.mode}, not RGB; --convert converts it as pytorch-fid does"
            )
        if image.has_transparency_data:
            raise EvaluationError(f"{name}: has a transparent colour; --convert drops it")
    return _upright(name, image, data)


def _is_deep(tile: Any) -> bool:
    """Whether an image tile has more than 8 bits per channel, which Pillow silently reduces."""
    codec, *_, args = tile
    if codec.startswith("ppm"):
        return isinstance(args, tuple) and args[-1] > 255
    return re.search(r"(?<!BGR);16", str(args)) is not None  # BGR;16 has 16 bits for all three


def _upright(name: str, image: Image.Image, data: bytes) -> Image.Image:
    """Rotate an image by its EXIF orientation, decoding it only if necessary."""
    # Pillow decodes any PNG to look for EXIF at its end.
    if image.format == "PNG" and not any(mark in data for mark in _EXIF_IN_PNG):
        return image
    with _decoding(name):
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        return ImageOps.exif_transpose(image) if turned else image


_EXIF_IN_PNG = (b"eXIf", b"Raw profile type", b"tiff:Orientation")


def decode_image(name: str, image: Image.Image, options: ReadOptions) -> Image.Image:
    """Decode an image that :func:`open_image` opened, to RGB and at the requested size.

    Raises:
        EvaluationError: If the file is truncated or damaged.
    """
    with _decoding(name):
        rgb = image.convert("RGB")
    if options.size is None:
        return rgb
    return ImageOps.fit(rgb, (options.size,) * 2, Image.Resampling.LANCZOS)


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    """Raise Pillow's errors as an :class:`EvaluationError`."""
    try:
        yield
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        raise EvaluationError(f"{name}: is damaged or truncated ({_first_line(error)})") from None


def _first_line(error: BaseException) -> str:
    text = str(error).replace("<_io.BytesIO object at ", "").split("\n")[0]
    return "unknown format" if text.startswith("cannot identify") else text
