"""What a device other than the CPU would meet: no tensor of another device, no wait, few launches.

The device is one of :mod:`stand_in_device`, in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.utils import backend_registration

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("stand_in_device.py")

MOST = {"keys": 3, "agent": 20, "merge": 20, "full": 0}
"""Operations that a patched layer may have beyond those of an unpatched one."""

MORE = {"agent, few merged": 3, "merge, whole block": 8}
"""What asks for more: agents that are not the destinations alone, and merging in other parts."""


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this PyTorch has no backends written in Python",
)
def test_a_device_that_is_not_the_cpu() -> None:
    """A single test, as the process behind it takes a while."""
    ran = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads(ran.stdout)
    check_runs(found["runs"], found["controls"])
    assert len(found["operations"]) == 15
    for name, steps in found["operations"].items():
        for step, count in steps.items():
            check_operations(f"{name}, {step}", *step.split(", "), count)


def check_runs(runs: dict[str, str | None], controls: dict[str, str]) -> None:
    """Whole runs stay on the device and wait for nothing, and it would show if they did."""
    assert {name: error for name, error in runs.items() if error} == {}
    assert len(runs) > 12
    assert controls["a wait"].startswith("DataDependentOutputException")
    assert "but found at least two devices" in controls["a tensor left on the CPU"]


def check_operations(name: str, method: str, kind: str, count: dict[str, Any]) -> None:
    """A patched layer has few more operations, and the hook none after the first image.

    But for the forecast of a light step, which is its work.
    """
    assert count["unpatched"] > 50
    assert count["hook"] == (kind == "light"), name
    if kind == "whole":
        more = sum(extra for option, extra in MORE.items() if option in name)
        assert count["a layer"] <= MOST[method] + more, name
