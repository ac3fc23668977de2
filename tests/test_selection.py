"""Which tests are quick, and that the markers and docs/compatibility.md fit the tests."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from compatibility import read_page, row_of
from typer.main import get_command

from agentsd.cli import agentsd

ROOT = Path(__file__).parents[1]


def markers(items: list[pytest.Item]) -> set[str]:
    return {marker.name for item in items for marker in item.iter_markers()}


def test_each_marker_is_used(collected: list[pytest.Item]) -> None:
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = settings.partition("\nmarkers = [")[2].partition("\n]")[0]
    registered = re.findall(r'^  "(\w+)', listed, re.MULTILINE)
    assert len(registered) == 6
    assert set(registered) <= markers(collected)


def test_each_slow_kind_has_a_quick_sample(collected: list[pytest.Item]) -> None:
    quick = [item for item in collected if item.get_closest_marker("quick")]
    assert {"slow", "browser", "cell"} <= markers(quick)
    assert len(quick) < len(collected)


def test_each_command_is_run_by_a_quick_test(collected: list[pytest.Item]) -> None:
    quick = [item for item in collected if item.get_closest_marker("quick")]
    run = {marker.args[0] for item in quick for marker in item.iter_markers("command")}
    top: Any = get_command(agentsd)
    commands = {
        " ".join((name, *under))
        for name, command in top.commands.items()
        for under in ([(each,) for each in getattr(command, "commands", ())] or [()])
    }
    assert run == commands


def test_the_page_of_what_works_has_a_row_for_each_test(collected: list[pytest.Item]) -> None:
    rows = {row for item in collected if (row := row_of(item))}
    assert read_page(ROOT / "docs" / "compatibility.md") == rows, "run make compatibility"
