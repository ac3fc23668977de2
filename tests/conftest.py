"""Fixtures for all tests, the selection of quick ones, and a table of the parity figures."""

from __future__ import annotations

import gc
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import compatibility
import pytest
from browser import find_chromium
from compatibility import Row

# Fixtures import PyTorch themselves: xdist's controller needs this file alone, and starts its
# workers once it is imported.

ROOT = Path(__file__).parents[1]

BROWSER = "browser"
"""Marker of the tests that open pages in Chromium."""

SLOW_KINDS = {"slow", "cell", BROWSER}
"""Markers of tests that are not quick, but for their samples."""

COLLECTED = pytest.StashKey[list[pytest.Item]]()
"""All tests, those that ``-m`` leaves out included."""

BROWSER_SWITCH = "AGENTSD_BROWSER_TESTS"
"""Environment variable: with ``required``, a missing browser fails the run."""

FIGURE = "parity"
"""Property of a test report that carries a figure for the table."""

NO_BROWSER = (
    "no Chromium found; `apt-get install chromium` or `.venv/bin/playwright install chromium`, "
    "then run the tests again"
)

# One thread per process, so that xdist workers, and what they start, do not oversubscribe cores.
# Read when a process imports PyTorch.
os.environ.setdefault("OMP_NUM_THREADS", "1")

CELL = "cell"
"""Property of a test report that carries a row of docs/compatibility.md."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--compatibility", type=Path, metavar="FILE", help="write docs/compatibility.md to FILE"
    )


def pytest_configure(config: pytest.Config) -> None:
    # diffusers' schedulers cause tens of thousands of these.
    config.addinivalue_line("filterwarnings", "ignore:__array:DeprecationWarning")
    switch = os.environ.get(BROWSER_SWITCH)
    if switch not in (None, "required"):
        raise pytest.UsageError(f"{BROWSER_SWITCH} must be 'required' or unset (got {switch!r})")
    if switch and find_chromium() is None:
        raise pytest.UsageError(f"{BROWSER_SWITCH}={switch}, but: {NO_BROWSER}")


@pytest.hookimpl(tryfirst=True)  # before ``-m`` selects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[COLLECTED] = [*items]
    for item in items:
        kinds = {marker.name for marker in item.iter_markers()}
        if "sample" in kinds or not kinds & SLOW_KINDS:
            item.add_marker("quick")
    marked = [item for item in items if item.get_closest_marker(BROWSER)]
    if marked and find_chromium() is None:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=NO_BROWSER))


def pytest_collection_finish() -> None:
    """Have garbage collections pass over what was imported, which stays in any case."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Threads do not speed up tiny tensors, and slow them down on a busy machine."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def collected(request: pytest.FixtureRequest) -> list[pytest.Item]:
    """All tests, those that are not selected to run included."""
    items = request.config.stash[COLLECTED]
    files = {path.name for path in Path(__file__).parent.glob("test_*.py")}
    if files - {item.path.name for item in items}:
        pytest.skip("only some of the test files were collected")
    return items


@pytest.fixture(autouse=True)
def _cell(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> None:
    """Add a marked test's row to its report."""
    if row := compatibility.row_of(request.node):
        record_property(CELL, tuple(row))  # which can be sent between processes


@pytest.fixture
def unet() -> Any:
    """A fresh one: building it takes no longer than copying one would."""
    from tiny_models import tiny_unet

    return tiny_unet()


@pytest.fixture
def pipe(tmp_path: Path) -> Any:
    from tiny_models import tiny_pipeline

    return tiny_pipeline(tmp_path)


@pytest.fixture(scope="session")
def small_pocket(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment of a process whose pocket model makes images of 128 × 128 pixels by default.

    Half the size of the true one: the smallest at which the schedules change something.
    """
    place = tmp_path_factory.mktemp("small_pocket")
    shutil.copytree(ROOT / "agentsd", place / "agentsd")
    (place / "configs").symlink_to(ROOT / "configs")
    config = place / "agentsd" / "pocket" / "unet" / "config.json"
    text = config.read_text(encoding="utf-8")
    assert '"sample_size": 64' in text
    config.write_text(text.replace('"sample_size": 64', '"sample_size": 32'), encoding="utf-8")
    commands = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PYTHONPATH": str(place), "PATH": commands}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, started once a module: while it runs, a test cannot run an event loop."""
    from serving import chromium

    with chromium() as browser:
        yield browser


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
        rows = [(Row(*row), outcome) for name, row, outcome in properties if name == CELL]
        compatibility.write_page(page, rows)
    skipped = [str(report.longrepr) for report in terminalreporter.stats.get("skipped", [])]
    if count := sum(NO_BROWSER in reason for reason in skipped):
        terminalreporter.write_line(f"{count} browser tests skipped: {NO_BROWSER}")
    rows = [value for name, value, _ in properties if name == FIGURE]
    if not rows:
        return
    terminalreporter.section("parity: relative L2 distance to the reference")
    for what, check, value, verdict in sorted(rows):
        terminalreporter.write_line(f"{what:12} {check:42} {value:9.2e}  {verdict}")
