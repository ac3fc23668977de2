"""What commands print: results on stdout; progress, notes and errors on stderr."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.status import Status
from rich.table import Table
from rich.text import Text

from ..progress import Bar

stdout = Console(highlight=False, soft_wrap=True)
stderr = Console(stderr=True, highlight=False, soft_wrap=True)


def show(result: Any, text: str, as_json: bool) -> None:
    """Print a result: as JSON, or as text for people."""
    stdout.print(json.dumps(result) if as_json else text, markup=False)


def show_table(table: Table) -> None:
    """Print a table; a file or a pipe gets 120 columns rather than 80."""
    Console(highlight=False, width=None if stdout.is_terminal else 120).print(table)


def note(message: object) -> None:
    """Print a note in one line."""
    stderr.print(f"note: {_printable(str(message))}", style="yellow", markup=False)


def error(message: str) -> None:
    """Print an error in one line."""
    stderr.print(f"error: {_printable(message)}", style="red", markup=False)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


def loading(model: str) -> Status:
    """Show that a model is being loaded until the end of a ``with`` block."""
    return stderr.status(Text(f"loading {model} …"))


def progress_style() -> str:
    """A progress bar on a terminal, plain lines elsewhere."""
    return "rich" if stderr.is_terminal else "plain"


def progress_bar(what: str, total: int, done: int = 0) -> Bar:
    """A bar that counts ``what`` on stderr."""
    return Bar(progress_style(), total, done, stderr, what)
