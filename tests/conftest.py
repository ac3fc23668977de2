"""Fixtures for all tests, a table of the parity figures, and docs/compatibility.md.

A test marked ``cell(group, name, verdict, note)`` is a row of that page: what is tried together
with the patch. Without a name it is that of its parameters; the verdict holds if the test passes.
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

from agentsd.patching import runtime

BROWSER = "browser"
"""Mark of the tests that open pages in Chromium."""

BROWSER_SWITCH = "AGENTSD_BROWSER_TESTS"
"""Environment variable: with ``required``, a missing browser fails the run."""

FIGURE = "parity"
"""Property of a test report under which a figure for the table travels."""


NO_BROWSER = (
    "no Chromium found; `apt-get install chromium` or `.venv/bin/playwright install chromium`, "
    "then run the tests again"
)

CELL = "cell"
"""Likewise, for a row of docs/compatibility.md."""

SUMMARY = {
    "works": "work",
    "refused": "are refused",
    "fails": "fail",
    "not tried": "were not tried",
}
"""Verdicts of several rows."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--compatibility", type=Path, metavar="FILE", help="write that page")


def pytest_configure(config: pytest.Config) -> None:
    # diffusers' schedulers hand tensors to NumPy in a way that it will drop; tens of thousands.
    config.addinivalue_line("filterwarnings", "ignore:__array:DeprecationWarning")
    config.addinivalue_line("markers", "cell(group, name, verdict, note): see conftest.py")
    config.addinivalue_line("markers", f"{BROWSER}: opens pages in Chromium")
    wanted = os.environ.get(BROWSER_SWITCH)
    if wanted not in (None, "required"):
        raise pytest.UsageError(f"{BROWSER_SWITCH} must be 'required' or unset (got {wanted!r})")
    if wanted and find_chromium() is None:
        raise pytest.UsageError(f"{BROWSER_SWITCH}={wanted}, but: {NO_BROWSER}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    needing = [item for item in items if item.get_closest_marker(BROWSER)]
    if needing and find_chromium() is None:
        for item in needing:
            item.add_marker(pytest.mark.skip(reason=NO_BROWSER))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Tiny tensors gain nothing from threads, and lose much on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _cell(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> None:
    """Have a marked test's row travel with its report."""
    marker = request.node.get_closest_marker(CELL)
    if marker is not None:
        name = marker.kwargs.get("name") or request.node.callspec.id
        told = marker.kwargs.get("verdict", "works"), marker.kwargs.get("note", "")
        record_property(CELL, (marker.args[0], name, *told))


@pytest.fixture
def small_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patch layers of any size, for tests whose models are far smaller than what gains by it."""
    monkeypatch.setattr(runtime, "MIN_TOKENS", dict.fromkeys(runtime.MIN_TOKENS, 0))


@pytest.fixture
def unet() -> UNet2DConditionModel:
    return tiny_unet()


@pytest.fixture
def pipe(tmp_path: Path) -> Any:
    return tiny_pipeline(tmp_path)


@pytest.fixture
def figure(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Put a figure into the table: ``figure(what, check, value, verdict)``."""

    def put(what: str, check: str, value: float, verdict: str) -> None:
        # A plain float, which travels between processes, whatever kind it was computed in.
        record_property(FIGURE, (what, check, float(value), verdict))

    return put


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    kinds = ("passed", "failed", "skipped")
    reports = [report for kind in kinds for report in terminalreporter.stats.get(kind, [])]
    told = [
        (name, value, report.outcome)
        for report in reports
        for name, value in getattr(report, "user_properties", ())
        if report.when == "call"
    ]
    if page := config.getoption("--compatibility"):
        _write_page(page, [(*value, outcome) for name, value, outcome in told if name == CELL])
    skipped = [str(report.longrepr) for report in terminalreporter.stats.get("skipped", [])]
    if without := sum(NO_BROWSER in reason for reason in skipped):
        terminalreporter.write_line(f"{without} browser tests skipped: {NO_BROWSER}")
    rows = [value for name, value, _ in told if name == FIGURE]
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
    cells = sorted(  # several tests of one name are one row, as long as they agree
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
