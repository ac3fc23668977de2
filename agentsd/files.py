"""List the files of a folder, and detect changes of a file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def files_below(folder: Path) -> Iterator[Path]:
    """The files of a folder and its subfolders, except hidden ones.

    Links to folders are followed, as when the folder is loaded, but each folder is read only once.

    Raises:
        OSError: If a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise error

    seen = {*folder.resolve().parents}  # a link to one of these is a loop
    for root, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        real = Path(root).resolve()
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(root, name) for name in files if not name.startswith("."))


def file_state(path: str | Path) -> tuple[int, ...]:
    """A value that changes when a file does, even if its modification time is kept (``cp -p``).

    Raises:
        OSError: If there is no such file.
    """
    now = Path(path).stat()
    return now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns
