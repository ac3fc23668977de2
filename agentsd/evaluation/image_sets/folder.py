"""Image sets in plain folders."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from ...errors import EvaluationError
from ...files import files_below
from ...text_files import read_text
from .entry import SUFFIXES, ImageEntry, read_bytes, warn_of_unread_files


def read_folder(folder: Path) -> list[ImageEntry]:
    """List the images below a folder, with prompts from ``NAME.txt`` beside them.

    Raises:
        EvaluationError: If a folder or prompt cannot be read.
    """
    try:
        files = sorted(files_below(folder))
    except OSError as error:
        raise EvaluationError(f"{error.filename}: cannot be read ({error.strerror})") from None
    images = [file for file in files if file.suffix.lower() in SUFFIXES]
    others = {file for file in files if file.suffix.lower() != ".txt"} - {*images}
    warn_of_unread_files(folder, [file.suffix.lower() or file.name for file in others])
    return [ImageEntry(str(file), partial(read_bytes, file), _prompt(file)) for file in images]


def _prompt(image: Path) -> str | None:
    text = image.with_suffix(".txt")
    return read_text(text, EvaluationError).strip() or None if text.is_file() else None
