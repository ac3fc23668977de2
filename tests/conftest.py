"""Fixtures for all tests, and a table of the parity figures at the end of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from tiny_models import tiny_pipeline, tiny_unet

from agentsd import runtime

FIGURE = "parity"
"""Property of a test report under which a figure for the table travels."""


def pytest_configure(config: pytest.Config) -> None:
    # diffusers' schedulers hand tensors to NumPy in a way that it will drop; tens of thousands.
    config.addinivalue_line("filterwarnings", "ignore:__array:DeprecationWarning")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Tiny tensors gain nothing from threads, and lose much on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _small_layers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patch layers of any size: the tests' models are far below what gains by it."""
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
    return lambda *row: record_property(FIGURE, row)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reports = [r for kind in ("passed", "failed") for r in terminalreporter.stats.get(kind, [])]
    rows = [
        value
        for report in reports
        for name, value in getattr(report, "user_properties", ())
        if name == FIGURE and report.when == "call"
    ]
    if not rows:
        return
    terminalreporter.section("parity: relative L2 distance to the reference")
    for what, check, value, verdict in sorted(rows):
        terminalreporter.write_line(f"{what:12} {check:42} {value:9.2e}  {verdict}")
