"""How far a run is: one bar for all its processes, or plain lines, on stderr."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_EVERY = 10.0
"""Seconds between plain lines."""


class Bar:
    """Shows how many images are made, how many a second, and the time left.

    Args:
        how: ``"rich"``, ``"plain"`` or ``"none"``.
        total: Images of the whole run.
        done: Of these, made before.
        console: Where to.
    """

    def __init__(self, how: str, total: int, done: int, console: Console) -> None:
        self._how, self._total, self._first, self._console = how, total, done, console
        self._begun = self._told_at = time.monotonic()
        self._told = done
        self._rich = Progress(
            TextColumn("images"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=console,
            disable=how != "rich",
        )
        self._task = self._rich.add_task("", total=total, completed=done, rate="")

    def __enter__(self) -> Bar:
        self._rich.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._rich.stop()

    def show(self, done: int) -> None:
        """Tell that so many images are made."""
        now = time.monotonic()
        rate = (done - self._first) / max(now - self._begun, 1e-9)
        self._rich.update(self._task, completed=done, rate=f"{rate:.2f}/s")
        due = done == self._total or now - self._told_at >= PLAIN_EVERY
        if self._how == "plain" and done != self._told and due:
            self._told, self._told_at = done, now
            left = f"{(self._total - done) / rate:.0f} s left" if rate else "time left unknown"
            line = f"{done}/{self._total} images, {rate:.2f} images/s, {left}"
            self._console.print(line, markup=False)

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, style="yellow", markup=False)
