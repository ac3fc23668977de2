"""Which steps of a run are light, and the deep feature that they build on.

A UNet's deep layers change slowly from step to step. DeepCache (Ma et al., 2023, arXiv 2312.00858)
computes them every few steps and reuses their last output in between; here the output is
extrapolated through the last whole steps: along a line that is damped where an image's features do
not keep their direction, or along a plain line or parabola (Lagrange).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..methods import Cache
from ..schedule import Phase, Schedule
from .step_cache import MAX_FEATURES, Feature

FIRST_SHARE = 0.5
"""How far a damped line goes while only two features are known."""


def has_light_steps(phase: Phase, num_steps: int) -> bool:
    """Whether a phase has light steps in a run of ``num_steps``."""
    return phase.cache is not None and phase.cache.has_light_steps(num_steps)


def usable(known: Sequence[Feature], phase: Phase, step: int, num_steps: int) -> Sequence[Feature]:
    """The features that a step is forecast from; empty for a whole step.

    The first step of each phase is whole, and so are the last step of the run and, counting back
    from it, every ``interval``-th step. The first light steps of a run have fewer features than
    later ones, and may reuse the only one.

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
    return known[-features_used(cache) :]


def features_used(cache: Cache) -> int:
    """How many features a forecast uses, once they are known."""
    return MAX_FEATURES if cache.order is None else cache.order + 1


class Forecast(NamedTuple):
    """A deep feature, as a weighted sum of earlier ones."""

    value: Tensor
    weights: dict[int, float | Tensor]
    """The weight of each earlier step's feature; a tensor [B, 1, ...] where images differ."""


def forecast(features: Sequence[Feature], step: int) -> Forecast:
    """Forecast the deep feature of a step.

    Args:
        features: What is :func:`usable` for the step, the oldest first; one or more.
        step: Index of the step.
    """
    steps, last = [feature.step for feature in features], features[-1]
    if last.phase.cache is None or last.phase.cache.order is not None or len(features) == 1:
        weights = lagrange_weights(steps, step)
        value = extrapolated({float(f.step): f.value for f in features}, float(step))
        return Forecast(value, dict(zip(steps, weights, strict=True)))
    ahead = (step - steps[-1]) / (steps[-1] - steps[-2]) * line_share(features, step)
    value = torch.lerp(features[-2].value, last.value, (1 + ahead).to(last.value.dtype))
    return Forecast(value, {steps[-2]: -ahead, steps[-1]: 1 + ahead})


def line_share(features: Sequence[Feature], step: int) -> Tensor:
    """How far along the line through the last two features a forecast should go, per image.

    The share is 1 where the last two changes of a feature were equal, so that the line goes on, and
    0 where they have nothing in common, so that the last value is best. In between it follows from
    how much of the change before last returned in the last one (the regression of one on the
    other), converted from the distance between features to the shorter one of the forecast. The
    conversion takes the changes from step to step for an autoregressive process.

    Args:
        features: Two or three, the oldest first.
        step: Index of the step to forecast.

    Returns:
        Shares from 0 to 1 in float32, [B, 1, ...], on the features' device.
    """
    *_, before, last = (feature.value for feature in features)
    rows = [len(last), *(1 for _ in last.shape[1:])]
    if len(features) == 2:
        return torch.full(rows, FIRST_SHARE, device=last.device)
    oldest, middle, newest = (feature.step for feature in features)
    earlier = (before - features[0].value).flatten(1).float()
    later = (last - before).flatten(1).float()
    dot, norm = torch.linalg.vecdot(earlier, later), torch.linalg.vecdot(earlier, earlier)
    gaps = middle - oldest, newest - middle, step - newest
    returned = dot / norm.clamp(min=torch.finfo(norm.dtype).tiny) * (gaps[0] / gaps[1])
    exponent = math.log(_ar_share(gaps[1], gaps[2])) / math.log(_ar_share(gaps[0], gaps[1]))
    share: Tensor = returned.clamp(0, 1).pow(exponent).view(rows)
    return share


def _ar_share(last: int, ahead: int) -> float:
    """The best share of the line through an autoregressive process's last ``last`` increments.

    For a correlation of ½ between successive increments. The share for other correlations is close
    to a power of this one: at a gap of two steps the exact share differs from that power by at most
    0.03.
    """
    r = 0.5
    shared = sum(r ** (i + j) for i in range(last) for j in range(1, ahead + 1))
    own = sum(r ** abs(i - j) for i in range(last) for j in range(last))
    return shared / own * last / ahead


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
