"""Plain lines of progress: not more often than due, with the rate and the time left."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from agentsd import progress
from agentsd.progress import Bar


def lines(monkeypatch: pytest.MonkeyPatch, how: str, shown: dict[float, int]) -> list[str]:
    """What is written where so much is done at these seconds; of 100, 10 were done before."""
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    out = io.StringIO()
    with Bar(how, 100, 10, Console(file=out), "pairs") as bar:
        for now, done in shown.items():  # noqa: B007  # the clock reads it
            bar.show(done)
    return out.getvalue().split("\n")[:-1]


def test_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = {0.1: 10, 5.0: 11, 10.0: 20, 19.9: 21, 40.0: 30, 60.0: 30, 80.0: 100}
    assert lines(monkeypatch, "plain", shown) == [
        "20/100 pairs, 1.00/s, 80 s left",
        "30/100 pairs, 0.50/s, 2 min left",
        "100/100 pairs, 1.12/s, 0 s left",
    ]
    assert lines(monkeypatch, "none", shown) == []
