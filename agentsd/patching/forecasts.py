"""Which steps of a run are light, and the deep feature that they build on.

A UNet's deep layers change slowly from step to step. DeepCache (Ma et al., 2023, arXiv 2312.00858)
computes them every few steps and reuses their last output in between; here the output is
extrapolated along a line or parabola (Lagrange) through the last whole steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..schedule import Phase, Schedule
from .step_cache import Feature


def has_light_steps(phase: Phase, num_steps: int) -> bool:
    """Whether a phase has light steps in a run of ``num_steps``."""
    return phase.cache is not None and phase.cache.has_light_steps(num_steps)


def usable(known: Sequence[Feature], phase: Phase, step: int, num_steps: int) -> Sequence[Feature]:
    """The features that a step is forecast from; empty for a whole step.

    The first step of each phase is whole, and so are the last step of the run and, counting back
    from it, every ``interval``-th step. Forecasts use up to ``order + 1`` features: the first light
    steps of a run reuse the only feature that is known.

    Args:
        known: Features of earlier steps of the run, the oldest first.
        phase: The step's phase, which has a cache.
        step: Index of the step, from 0.
        num_steps: Number of steps of the run.
    """
    cache = phase.cache
    assert cache is not None
    known = [feature for feature in known if feature.branch == cache.branch]
    begins = not known or known[-1].phase is not phase
    if begins or (num_steps - 1 - step) % cache.interval == 0:
        return []
    return known[-1 - cache.order :]


def forecast(features: Sequence[Feature], step: int) -> Tensor:
    """Forecast the deep feature of a step from the features that are :func:`usable` for it."""
    values = {float(feature.step): feature.value for feature in features}
    return extrapolated(values, float(step))


def whole_steps(schedule: Schedule, num_steps: int) -> list[bool]:
    """Whether each step of a complete run is a whole step.

    Example:
        >>> from agentsd import Cache, Keys, Schedule
        >>> schedule = Schedule(phases=[Keys(cache=Cache(interval=3))])
        >>> "".join("light whole ".split()[w][0] for w in whole_steps(schedule, 12))
        'wlwllwllwllw'
    """
    known: list[Feature] = []
    whole = []
    for step in range(num_steps):
        phase = schedule.phase_at(step, num_steps)
        caches = has_light_steps(phase, num_steps)
        whole.append(not caches or not usable(known, phase, step, num_steps))
        if not caches:
            known.clear()
        elif whole[-1]:
            known.append(Feature(step, phase, torch.empty(0)))
    return whole


def planned_calls(schedule: Schedule, num_steps: int) -> list[tuple[Phase, bool]]:
    """The phase of each step of a complete run, and whether the step is whole."""
    whole = whole_steps(schedule, num_steps)
    return [(schedule.phase_at(step, num_steps), is_whole) for step, is_whole in enumerate(whole)]


def lagrange_weights(places: Sequence[float], x: float) -> list[float]:
    """The Lagrange weights at ``x`` of values known at ``places``.

    Example:
        >>> lagrange_weights([0, 2], 3)
        [-0.5, 1.5]
    """
    return [
        math.prod((x - other) / (place - other) for other in places if other != place)
        for place in places
    ]


def extrapolated(known: Mapping[float, Tensor], x: float) -> Tensor:
    """Evaluate the polynomial through known values (Neville's scheme).

    Args:
        known: Values by position.
        x: Position to evaluate it at.
    """
    places, values = list(known), list(known.values())
    if len(values) == 1:
        return values[0].clone()
    for width in range(1, len(places)):
        values = [
            torch.lerp(a, b, (x - start) / (end - start))
            for a, b, start, end in zip(values, values[1:], places, places[width:], strict=False)
        ]
    return values[0]
