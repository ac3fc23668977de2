"""Files of the images that visitors made: where they are, and how long they stay."""

from __future__ import annotations

import secrets
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ...generation.records import ImageRecord

FILES_LAST = 3 * 3600
"""Seconds after which files that visitors made are deleted."""


class SavedImage(NamedTuple):
    """An image of the history."""

    file: str
    caption: str
    record: ImageRecord


def new_folder(folder: str) -> Path:
    """A folder whose name nobody can guess; those that are too old are deleted.

    Args:
        folder: Folder of the page's files, which gradio serves.
    """
    secret = Path(folder) / secrets.token_hex(16)
    secret.mkdir(parents=True)
    for old in Path(folder).iterdir():
        with suppress(OSError):  # it is gone already
            if time.time() - old.stat().st_mtime > FILES_LAST:
                shutil.rmtree(old)
    return secret
