"""Read schedules from visitors: bounded in size and time, and never from a file they name."""

from __future__ import annotations

from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from ...errors import ScheduleError
from ...schedule import Schedule
from ...settings import parse_yaml, short_repr

CUSTOM = "custom"
"""Name of a schedule that is not a preset."""

MAX_YAML = 16 * 1024
"""Bytes of a schedule; the presets have fewer than 1,000."""

MAX_BRACKETS = 64
"""Brackets in a schedule; a parser takes minutes for thousands of nested ones."""

MAX_PHASES = 16
"""Phases of a schedule."""


def read_schedule(text: Any) -> Schedule:
    """Read a schedule from a preset's name or from YAML text.

    Raises:
        ScheduleError: As for :func:`read_yaml` and :func:`check_schedule`.
    """
    if isinstance(text, str) and text in Schedule.presets():
        return Schedule.preset(text)
    return check_schedule(read_yaml(text))


def check_schedule(data: Any) -> Schedule:
    """Read a schedule from plain values.

    Raises:
        ScheduleError: If it is not valid or has too many phases.
    """
    try:
        schedule = Schedule.from_dict(data)
    except ScheduleError as error:
        raise ScheduleError(f"YAML text: {error}") from None
    if len(schedule.phases) > MAX_PHASES:
        raise ScheduleError(f"at most {MAX_PHASES} phases here (got {len(schedule.phases)})")
    return schedule


def read_yaml(text: Any) -> Any:
    """Read the plain values of a schedule's YAML, valid or not.

    Raises:
        ScheduleError: If it is not YAML, too long, too deep, or has anchors, which let a short
            text stand for an endless one.
    """
    if not isinstance(text, str):
        raise ScheduleError(f"expected a preset's name or YAML text (got {short_repr(text)})")
    size = len(text.encode(errors="replace"))
    if size > MAX_YAML:
        raise ScheduleError(f"the YAML may have at most {MAX_YAML:,} bytes (got {size:,})")
    if text.count("[") + text.count("{") > MAX_BRACKETS:
        raise ScheduleError(f"the YAML may have at most {MAX_BRACKETS} brackets")
    if line := _first_anchor(text):
        raise ScheduleError(f"YAML text: line {line}: anchors are not allowed here")
    return parse_yaml(text, "YAML text", ScheduleError)


def _first_anchor(text: str) -> int | None:
    try:
        for event in YAML(typ="safe", pure=True).parse(text):
            if getattr(event, "anchor", None) is not None:
                return int(event.start_mark.line) + 1
    except (YAMLError, ValueError, RecursionError):
        pass  # parse_yaml reports it, with its line
    return None
