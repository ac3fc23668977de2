"""The images of a set: how to read their files, and their metadata."""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ...errors import EvaluationError
from ...text_files import prompt_lines

SUFFIXES = (
    *(".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff"),
    ".webp",
)
"""Suffixes that pytorch-fid reads, other names of JPEG, and GIF."""

HIDDEN = "replaced with a black image by a safety checker"


class ImageEntry(NamedTuple):
    """An image of a set, not read yet, with its metadata."""

    name: str
    """Its name in messages."""
    read: Callable[[], bytes]
    prompt: str | None = None
    seed: int | None = None
    digest: str | None = None
    """SHA-256 from the manifest."""
    model: str | None = None
    hidden: bool = False
    """Whether a safety checker replaced it with a black image."""

    def read_verified(self) -> tuple[bytes, str]:
        """Read the file, and check it against the manifest.

        Returns:
            Its bytes, and their SHA-256.

        Raises:
            EvaluationError: If the file cannot be read or has changed.
        """
        data = self.read()
        digest = hashlib.sha256(data).hexdigest()
        if self.digest not in (None, digest):
            raise EvaluationError(f"{self.name} has changed since its manifest was written")
        return data, digest


def visible(images: list[ImageEntry]) -> list[ImageEntry]:
    """The images that no safety checker replaced with a black one.

    Raises:
        EvaluationError: If no image is left.
    """
    left = [image for image in images if not image.hidden]
    if not left:
        raise EvaluationError(f"{HIDDEN}: all {len(images)} images, such as {images[0].name}")
    return left


def with_prompts(images: list[ImageEntry], file: Path) -> list[ImageEntry]:
    """The images with prompts from a text file, in the order of its lines.

    Raises:
        EvaluationError: If the numbers of lines and images differ, or a line is empty.
    """
    lines = prompt_lines(file, EvaluationError)
    if len(lines) != len(images):
        raise EvaluationError(
            f"{file} has {len(lines)} prompts for {len(images)} images; write one line per image"
        )
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise EvaluationError(f"{file}:{number}: empty")
    return [image._replace(prompt=line) for image, line in zip(images, lines, strict=True)]


def read_bytes(file: Path) -> bytes:
    """The content of a file.

    Raises:
        EvaluationError: If it cannot be read.
    """
    try:
        return file.read_bytes()
    except OSError as error:
        raise EvaluationError(f"{file}: cannot be read ({error.strerror or error})") from error


def warn_of_unread_files(place: Path, kinds: list[str]) -> None:
    """Warn of the files in a set that are not read, with their counts.

    Args:
        place: The folder or tar.
        kinds: For each such file its suffix, or its name if it has none.
    """
    if kinds:
        counts = ", ".join(f"{count} {kind}" for kind, count in Counter(sorted(kinds)).items())
        warnings.warn(f"{place}: files left out: {len(kinds)} ({counts})", stacklevel=2)
