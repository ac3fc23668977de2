"""Read files that visitors upload, which may contain anything."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from ...errors import ScheduleError, SettingsError
from ...generation.a1111 import read_parameters
from ...generation.image_files import read_record
from ...generation.records import ImageRecord
from ...text_files import decode_text
from .schedule_text import MAX_YAML

MAX_PNG = 20 * 2**20
"""Bytes of an image."""

MAX_PNG_PIXELS = 64 * 2**20
"""Pixels of an image."""


def read_uploaded_image(path: str | Path) -> ImageRecord:
    """Read the record of an image, by agentsd or in the ``parameters`` of other programs.

    Raises:
        SettingsError: If the file is not a PNG with such settings, or too large.
    """
    file = Path(path)
    if file.stat().st_size > MAX_PNG:
        raise SettingsError(f"the file may have at most {MAX_PNG // 2**20} MB")
    try:
        with Image.open(file, formats=["PNG"]) as image:
            pixels = image.width * image.height
            texts = getattr(image, "text", {})
    except (OSError, ValueError, Image.DecompressionBombError):
        raise SettingsError("that file is not a PNG image") from None
    if pixels > MAX_PNG_PIXELS:
        raise SettingsError(f"the image may have at most {MAX_PNG_PIXELS:,} pixels")
    if "agentsd" not in texts and "parameters" in texts:
        return read_parameters(texts["parameters"])
    return read_record(file)


def read_uploaded_text(path: str | Path) -> str:
    """Read the text of a schedule, and delete its file.

    Raises:
        ScheduleError: If it is too large or not UTF-8.
    """
    file = Path(path)
    try:
        if file.stat().st_size > MAX_YAML:
            raise ScheduleError(f"the YAML may have at most {MAX_YAML:,} bytes")
        return decode_text(file.read_bytes(), "that file", ScheduleError)
    finally:
        file.unlink(missing_ok=True)
