"""Rows of docs/compatibility.md: what a test marked ``cell(group, name, verdict, note)`` tells.

Such a test combines something with the patch. The name defaults to the ID of the test's parameters;
the verdict holds if the test passes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import pytest

SUMMARY = {
    "works": "work",
    "refused": "are refused",
    "fails": "fail",
    "not tried": "were not tried",
}
"""Verdicts of several rows."""


class Row(NamedTuple):
    group: str
    name: str
    verdict: str
    note: str


def row_of(item: pytest.Item) -> Row | None:
    """The row of a marked test; None for another one."""
    marker = item.get_closest_marker("cell")
    if marker is None:
        return None
    name = marker.kwargs.get("name") or item.callspec.id  # type: ignore[attr-defined]
    (group,) = marker.args
    return Row(group, name, marker.kwargs.get("verdict", "works"), marker.kwargs.get("note", ""))


def write_page(page: Path, found: Iterable[tuple[Row, str]]) -> None:
    """Write the page from rows and the outcomes of their tests."""
    other = {
        "failed": ("fails", ""),
        "skipped": ("not tried", "packages of its own are not installed"),
    }
    rows = sorted(  # several tests with the same name are one row if they agree
        {
            Row(row.group, row.name, *other.get(outcome, (row.verdict, row.note)))
            for row, outcome in found
        }
    )
    counts = Counter(row.verdict for row in rows)
    count = ", ".join(f"{number} {SUMMARY[verdict]}" for verdict, number in counts.most_common())
    lines = [
        "# What works with a patch",
        "",
        "Written by `make compatibility` from what the tests found: each row is a test on small",
        f"random weights, on the CPU, with torch {version('torch')}, diffusers "
        f"{version('diffusers')} and transformers {version('transformers')}.",
        f"Of {len(rows)}: {count}.",
    ]
    for group in dict.fromkeys(row.group for row in rows):
        lines += ["", f"## {group}", "", "| | verdict | |", "|---|---|---|"]
        lines += [
            f"| {row.name} | {row.verdict} | {row.note} |" for row in rows if row.group == group
        ]
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_page(page: Path) -> set[Row]:
    """The rows of a page."""
    rows, group = set(), ""
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            group = line.removeprefix("## ")
        elif line.startswith("| ") and not line.startswith("| |"):
            name, verdict, note = (cell.strip() for cell in line.strip("|").split("|"))
            rows.add(Row(group, name, verdict, note))
    return rows
