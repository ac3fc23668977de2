"""Fixtures for all tests, a table of the parity figures, and docs/compatibility.md.

A test marked ``cell(group, name, verdict, note)`` is a row of that page: something that is combined
with the patch. The name defaults to the ID of the test's parameters; the verdict holds if the test
passes.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from browser import find_chromium
from diffusers import UNet2DConditionModel
from tiny_models import tiny_pipeline, tiny_unet

from agentsd.methods import Cache
from agentsd.patching import runtime

BROWSER = "browser"
"""Marker of the tests that open pages in Chromium."""

BROWSER_SWITCH = "AGENTSD_BROWSER_TESTS"
"""Environment variable: with ``required``, a missing browser fails the run."""

FIGURE = "parity"
"""Property of a test report that carries a figure for the table."""

NO_BROWSER = (
    "no Chromium found; `apt-get install chromium` or `.venv/bin/playwright install chromium`, "
    "then run the tests again"
)

# One thread a process: tests run in as many processes as there are cores, and those that they
# start would otherwise wait for each other's threads. Read when such a process imports PyTorch.
os.environ.setdefault("OMP_NUM_THREADS", "1")

CELL = "cell"
"""Property of a test report that carries a row of docs/compatibility.md."""

SUMMARY = {
    "works": "work",
    "refused": "are refused",
    "fails": "fail",
    "not tried": "were not tried",
}
"""Verdicts of several rows."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--compatibility", type=Path, metavar="FILE", help="write docs/compatibility.md to FILE"
    )


def pytest_configure(config: pytest.Config) -> None:
    # diffusers' schedulers cause tens of thousands of these.
    config.addinivalue_line("filterwarnings", "ignore:__array:DeprecationWarning")
    config.addinivalue_line("markers", "cell(group, name, verdict, note): see conftest.py")
    config.addinivalue_line("markers", f"{BROWSER}: opens pages in Chromium")
    switch = os.environ.get(BROWSER_SWITCH)
    if switch not in (None, "required"):
        raise pytest.UsageError(f"{BROWSER_SWITCH} must be 'required' or unset (got {switch!r})")
    if switch and find_chromium() is None:
        raise pytest.UsageError(f"{BROWSER_SWITCH}={switch}, but: {NO_BROWSER}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker(BROWSER)]
    if marked and find_chromium() is None:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=NO_BROWSER))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Threads do not speed up tiny tensors, and slow them down on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _cell(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> None:
    """Add a marked test's row to its report."""
    marker = request.node.get_closest_marker(CELL)
    if marker is not None:
        name = marker.kwargs.get("name") or request.node.callspec.id
        verdict, note = marker.kwargs.get("verdict", "works"), marker.kwargs.get("note", "")
        record_property(CELL, (marker.args[0], name, verdict, note))


@pytest.fixture
def small_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patch layers of any size, for models far smaller than those that gain by it."""
    monkeypatch.setattr(runtime, "MIN_TOKENS", dict.fromkeys(runtime.MIN_TOKENS, 0))


@pytest.fixture
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Light steps in runs of any length, for tests that take no longer than they must."""
    monkeypatch.setattr(Cache, "fewest_steps", property(lambda cache: cache.min_steps or 0))


@pytest.fixture
def unet() -> UNet2DConditionModel:
    return tiny_unet()


@pytest.fixture
def pipe(tmp_path: Path) -> Any:
    return tiny_pipeline(tmp_path)


@pytest.fixture
def figure(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Add a figure to the table: ``figure(what, check, value, verdict)``."""

    def put(what: str, check: str, value: float, verdict: str) -> None:
        # A plain float can be sent between processes, whatever type it was computed in.
        record_property(FIGURE, (what, check, float(value), verdict))

    return put


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    kinds = ("passed", "failed", "skipped")
    reports = [report for kind in kinds for report in terminalreporter.stats.get(kind, [])]
    properties = [
        (name, value, report.outcome)
        for report in reports
        for name, value in getattr(report, "user_properties", ())
        if report.when == "call"
    ]
    if page := config.getoption("--compatibility"):
        _write_page(
            page, [(*value, outcome) for name, value, outcome in properties if name == CELL]
        )
    skipped = [str(report.longrepr) for report in terminalreporter.stats.get("skipped", [])]
    if count := sum(NO_BROWSER in reason for reason in skipped):
        terminalreporter.write_line(f"{count} browser tests skipped: {NO_BROWSER}")
    rows = [value for name, value, _ in properties if name == FIGURE]
    if not rows:
        return
    terminalreporter.section("parity: relative L2 distance to the reference")
    for what, check, value, verdict in sorted(rows):
        terminalreporter.write_line(f"{what:12} {check:42} {value:9.2e}  {verdict}")


def _write_page(page: Path, cells: list[tuple[str, str, str, str, str]]) -> None:
    other = {
        "failed": ("fails", ""),
        "skipped": ("not tried", "packages of its own are not installed"),
    }
    cells = sorted(  # several tests with the same name are one row if they agree
        {
            (group, name, *other.get(outcome, (verdict, note)))
            for group, name, verdict, note, outcome in cells
        }
    )
    verdicts = [cell[2] for cell in cells]
    count = ", ".join(
        f"{number} {SUMMARY[verdict]}" for verdict, number in Counter(verdicts).most_common()
    )
    versions = (torch.__version__, diffusers.__version__, transformers.__version__)
    lines = [
        "# What works with a patch",
        "",
        "Written by `make compatibility` from what the tests found: each row is a test on small",
        "random weights, on the CPU, with torch {}, diffusers {} and transformers {}.".format(
            *versions
        ),
        f"Of {len(cells)}: {count}.",
    ]
    for group in dict.fromkeys(cell[0] for cell in cells):
        lines += ["", f"## {group}", "", "| | verdict | |", "|---|---|---|"]
        lines += [
            f"| {name} | {verdict} | {note} |" for of, name, verdict, note in cells if of == group
        ]
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")
