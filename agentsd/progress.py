"""Progress of a run: a bar, or plain lines without a terminal."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_EVERY = 10.0
"""Seconds between plain lines."""


class Bar:
    """Shows the progress, the rate and the time left.

    Args:
        how: ``"rich"``, ``"plain"`` or ``"none"``.
        total: Number of items, over all processes.
        done: Items that were done before.
        console: Where to show it.
        what: Name of the items, in the plural.
    """

    def __init__(
        self, how: str, total: int, done: int, console: Console, what: str = "images"
    ) -> None:
        self._how, self._total, self._first, self._console = how, total, done, console
        self._what = what
        self._begun = self._printed_at = time.monotonic()
        self._printed = done
        self._rich = Progress(
            TextColumn(what),
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
        """Show how many items are done."""
        now = time.monotonic()
        rate = (done - self._first) / max(now - self._begun, 1e-9)
        if self._how == "rich":
            self._rich.update(self._task, completed=done, rate=f"{rate:.2f}/s")
        due = done == self._total or now - self._printed_at >= PLAIN_EVERY
        if self._how == "plain" and done != self._printed and due:
            self._printed, self._printed_at = done, now
            left = _duration((self._total - done) / rate) if rate else "unknown time"
            line = f"{done}/{self._total} {self._what}, {rate:.2f}/s, {left} left"
            self._console.print(line, markup=False)

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, style="yellow", markup=False)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
