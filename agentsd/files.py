"""Which files a folder has, and whether one has changed."""

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


def file_state(path: str | Path) -> tuple[int, ...]:
    """What changes when a file does; its time of modification alone can be put back (``cp -p``).

    Raises:
        OSError: If there is no such file.
    """
    now = Path(path).stat()
    return now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns
