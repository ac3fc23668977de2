"""Results that ``print`` and notebooks show as a table."""

from __future__ import annotations

from html import escape
from io import StringIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


class ReportTable:
    """A result with a title and rows, shown in a terminal and in a notebook."""

    @property
    def title(self) -> str:
        """The result in one line."""
        raise NotImplementedError

    def _rows(self) -> tuple[list[str], list[list[str]]]:
        """The header, and the cells of each row."""
        raise NotImplementedError

    def table(self) -> Table:
        """The table, for a terminal."""
        from rich.table import Table  # not needed for patching

        header, rows = self._rows()
        table = Table(title=self.title)
        for name in header:
            table.add_column(name, overflow="fold")
        for row in rows:
            table.add_row(*row)
        return table

    def __str__(self) -> str:
        from rich.console import Console

        out = StringIO()
        Console(file=out, width=240).print(self.table())
        return out.getvalue()

    def _repr_html_(self) -> str:
        header, rows = self._rows()
        head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
        body = "".join(
            "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
        )
        return f"<p>{escape(self.title)}</p><table><tr>{head}</tr>{body}</table>"
