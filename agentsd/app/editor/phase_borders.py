"""The borders between phases, which are dragged on the timeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import floor
from pathlib import Path
from typing import Any

from ...errors import ScheduleError

SCRIPT = Path(__file__).with_name("phase_borders.js").read_text(encoding="utf-8")

DIGITS = 10_000
"""A border is kept to this part of a run; rounded down, so that it stays after its step."""


def border(phase: int, step: int, steps: int) -> str:
    """HTML of the border after ``step`` of ``steps``, at which phase number ``phase`` ends."""
    return (
        f'<span class="border" role="slider" tabindex="0" data-phase="{phase}" '
        f'aria-label="End of phase {phase + 1}" aria-valuemin="1" aria-valuemax="{steps - 1}" '
        f'aria-valuenow="{step}" aria-valuetext="after step {step} of {steps}"></span>'
    )


def move_border(
    phases: Sequence[Mapping[str, Any]], number: Any, step: Any, steps: int
) -> list[dict[str, Any]]:
    """The phases with the end of one of them after another step.

    Args:
        phases: As plain values.
        number: Of the phase, from 0; not the last one, which has no end.
        step: The last step of the phase, from 1.
        steps: Of the run.

    Raises:
        ScheduleError: If there is no such phase or step.

    Example:
        >>> move_border([{"method": "agent", "until": 0.4}, {"method": "merge"}], 0, 8, 10)
        [{'method': 'agent', 'until': 0.8}, {'method': 'merge'}]
    """
    if type(number) is not int or not 0 <= number < len(phases) - 1:
        raise ScheduleError(f"there is no border after phase {number!r}")
    if type(step) is not int or not 1 <= step < steps:
        raise ScheduleError(f"a border must be after step 1 to {steps - 1} (got {step!r})")
    changed = [dict(phase) for phase in phases]
    if "until_step" in changed[number]:
        changed[number]["until_step"] = step
    else:
        changed[number]["until"] = floor(step / steps * DIGITS + 1e-6) / DIGITS
    return changed
