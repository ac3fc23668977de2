"""The files of a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def files_below(folder: Path) -> Iterator[Path]:
    """The files of a folder and its subfolders, but for hidden ones.

    Links to folders are followed, as whoever loads the folder does, and each folder is read once,
    whatever links to it.

    Raises:
        OSError: If a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise error

    seen = {*folder.resolve().parents}  # a link to these is a loop
    for root, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        real = Path(root).resolve()
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(root, name) for name in files if not name.startswith("."))
