"""Which process makes what, where several share a folder and nothing else.

A claim is a file that only one process can create. It holds the name of its owner, who shows
that it lives by touching one file of its own; so the work of a process that died is free for the
others after a while, and no process ever waits for another. Claims save work and no more: should
two processes come to make the same image, they make the same bytes.
"""

from __future__ import annotations

import secrets
import threading
from contextlib import suppress
from pathlib import Path

from ...errors import OutputError


class Claims:
    """The claims of one process, which lives as long as the ``with`` block.

    Args:
        folder: Where the claims of all processes are.
        stale_after: Seconds of silence after which a process counts as dead.

    Raises:
        OutputError: If the folder cannot be written to.
    """

    def __init__(self, folder: Path, stale_after: float) -> None:
        self._folder = folder
        self._stale_after = stale_after
        self._name = secrets.token_hex(4)
        self._alive = self._life(self._name)
        self._over = threading.Event()
        self._pulse = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Claims:
        try:
            self._folder.mkdir(exist_ok=True)
            self._alive.touch()
        except OSError as error:
            raise OutputError(f"cannot write into {self._folder}: {error.strerror}") from error
        self._pulse.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._pulse.join()
        with suppress(OSError):
            self._alive.unlink()

    def take(self, name: str) -> bool:
        """Claim a piece of work; False if another process has it, or this one had it before.

        Raises:
            OutputError: If the folder cannot be written to.
        """
        claim = self._folder / name
        if self._create(claim):
            return True
        if not self._is_stale(claim):
            return False
        with suppress(FileNotFoundError):
            # Of those who saw it stale, one can rename it.
            freed = claim.rename(claim.with_name(f"{name}-{self._name}"))
            freed.unlink()
        return self._create(claim)

    def _create(self, claim: Path) -> bool:
        try:
            with claim.open("x") as file:
                file.write(self._name)
        except (FileExistsError, FileNotFoundError):  # taken, or the run is over and all is gone
            return False
        except OSError as error:
            raise OutputError(f"cannot write {claim}: {error.strerror}") from error
        return True

    def _is_stale(self, claim: Path) -> bool:
        try:
            owner = claim.read_text()
            # Between its creation and its first byte a claim has no owner yet.
            last = (self._life(owner) if owner else claim).stat().st_mtime
        except FileNotFoundError:
            return True
        # Compared with a time of the same disk: the clocks of two machines may differ.
        return self._alive.stat().st_mtime - last > self._stale_after

    def _life(self, name: str) -> Path:
        return self._folder / f"alive-{name}"

    def _beat(self) -> None:
        while not self._over.wait(self._stale_after / 6):
            with suppress(OSError):
                self._alive.touch()
