"""Divide the work between processes that share only a folder.

A claim is a file that only one process can create. It holds the name of its owner, which shows
that it is alive by touching a file of its own; so the work of a process that died becomes free
after a while, and no process ever waits for another. Claims only save work: if two processes make
the same image, they make the same bytes.
"""

from __future__ import annotations

import secrets
import threading
from contextlib import suppress
from pathlib import Path

from ...errors import OutputError


class Claims:
    """The claims of one process, valid within the ``with`` block.

    Args:
        folder: Holds the claims of all processes.
        stale_after: Seconds of silence after which a process counts as dead.

    Raises:
        OutputError: If the folder cannot be written to.
    """

    def __init__(self, folder: Path, stale_after: float) -> None:
        self._folder = folder
        self._stale_after = stale_after
        self._name = secrets.token_hex(4)
        self._alive = self._alive_file(self._name)
        self._over = threading.Event()
        self._heartbeat = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Claims:
        try:
            self._folder.mkdir(exist_ok=True)
            self._alive.touch()
        except OSError as error:
            raise OutputError(f"cannot write into {self._folder}: {error.strerror}") from error
        self._heartbeat.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._heartbeat.join()
        with suppress(OSError):
            self._alive.unlink()

    def take(self, name: str) -> bool:
        """Claim a piece of work; False if another process, or this one before, has claimed it.

        Raises:
            OutputError: If the folder cannot be written to.
        """
        claim = self._folder / name
        if self._create(claim):
            return True
        if not self._is_stale(claim):
            return False
        with suppress(FileNotFoundError):
            # Of the processes that saw it stale, only one can rename it.
            freed = claim.rename(claim.with_name(f"{name}-{self._name}"))
            freed.unlink()
        return self._create(claim)

    def _create(self, claim: Path) -> bool:
        try:
            with claim.open("x") as file:
                file.write(self._name)
        except (
            FileExistsError,
            FileNotFoundError,
        ):  # claimed, or the folder is gone
            return False
        except OSError as error:
            raise OutputError(f"cannot write {claim}: {error.strerror}") from error
        return True

    def _is_stale(self, claim: Path) -> bool:
        try:
            owner = claim.read_text()
            # A claim has no owner between its creation and its first byte.
            last = (self._alive_file(owner) if owner else claim).stat().st_mtime
        except FileNotFoundError:
            return True
        # Both times are the disk's: the clocks of two machines may differ.
        return self._alive.stat().st_mtime - last > self._stale_after

    def _alive_file(self, name: str) -> Path:
        return self._folder / f"alive-{name}"

    def _beat(self) -> None:
        while not self._over.wait(self._stale_after / 6):
            with suppress(OSError):
                self._alive.touch()
