"""The candidates of tuning: an attention method and a cache for each segment of a run."""

from __future__ import annotations

import math
from itertools import product
from typing import Any, NamedTuple

from ..methods import Cache
from ..patching.light_steps import OUTPUT
from ..schedule import Schedule

ATTENTION: tuple[dict[str, Any], ...] = (
    {"method": "keys", "sx": 2, "sy": 2, "keys": 1024},
    {"method": "keys", "sx": 4, "sy": 2, "keys": 512},
    {"method": "keys", "sx": 4, "sy": 4, "keys": 256},
    {"method": "full"},
)
"""Attention settings of a phase; the most useful first, in case time runs out."""

CACHES: tuple[Cache | None, ...] = (
    None,
    *(
        Cache.model_validate({"interval": interval, "branch": branch, "order": order})
        for interval, branch, order in product((2, 3, 4, 5), (0, OUTPUT), (None, 0, 2))
    ),
)
"""Cache settings of a phase; the first computes every step in full."""

FORECASTS = {None: "adaptive", 0: "held", 1: "linear", 2: "quadratic"}
"""What each ``order`` of a cache is called."""

MAX_SEGMENTS = 4


class Segment(NamedTuple):
    """A part of the run with one attention setting and one cache setting."""

    attention: int
    """Index into :data:`ATTENTION`."""
    cache: int
    """Index into :data:`CACHES`."""
    end: int
    """The step before which the segment ends."""


Candidate = tuple[Segment, ...]
"""The segments of a run, in order; the last one ends with the run."""


def uniform_candidates(num_steps: int) -> list[Candidate]:
    """Every attention setting with every cache setting, for the whole run."""
    choices = product(range(len(ATTENTION)), range(len(CACHES)))
    return [(Segment(attention, cache, num_steps),) for attention, cache in choices]


def schedule_of(candidate: Candidate, num_steps: int) -> Schedule:
    """The schedule of a candidate, its borders as fractions of the run.

    Example:
        >>> schedule_of((Segment(3, 0, 3), Segment(0, 1, 10)), 10).phase_at(3, 10).cache.interval
        2
    """
    phases = []
    for attention, cache, end in candidate:
        until = {} if end == num_steps else {"until": _share(end, num_steps)}
        phases.append({**until, **ATTENTION[attention], "cache": CACHES[cache]})
    return Schedule.from_dict({"phases": phases})


def _share(step: int, num_steps: int) -> float:
    """A step as a fraction of the run, rounded down so that a phase ends before it."""
    return math.floor(10_000 * step / num_steps) / 10_000


def describe(schedule: Schedule) -> str:
    """Describe a schedule briefly, phase by phase.

    Example:
        >>> describe(schedule_of((Segment(0, 0, 5), Segment(0, 4, 10)), 10))
        'until 50 %: keys 2×2; then: keys 2×2, every 2nd step whole, output adaptive'
    """
    parts = []
    for number, phase in enumerate(schedule.phases):
        words: str = phase.method
        if hasattr(phase, "sx"):
            words += f" {getattr(phase, 'sx')}×{getattr(phase, 'sy')}"  # noqa: B009
        if (cached := phase.cache) is not None:
            nth = {2: "2nd", 3: "3rd"}.get(cached.interval, f"{cached.interval}th")
            what = "output" if cached.branch == OUTPUT else "feature"
            how = FORECASTS[cached.order]
            words += f", every {nth} step whole, {what} {how}"
        if phase.until is not None:
            words = f"until {100 * phase.until:.3g} %: {words}"
        elif phase.until_step is not None:
            words = f"until step {phase.until_step}: {words}"
        elif number:
            words = f"then: {words}"
        parts.append(words)
    return "; ".join(parts)
