"""Judge schedules on images that they were not chosen on."""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import numpy as np

from ..evaluation.intervals import Interval, bootstrap
from .budget import SPEED, Budget

UNPATCHED = "unpatched"

Judged = list[dict[str, dict[str, float]]]
"""For each image, for each variant, its ``seconds`` and likenesses."""


def judge(judged: Judged, prompts: list[str], name: str, budget: Budget) -> dict[str, Any]:
    """What held-out images say of a variant.

    Args:
        judged: At least one image.
        prompts: Of each image; likenesses and times of one prompt are correlated.
        name: The variant.
        budget: What it is to keep to.

    Returns:
        ``time`` (as a share of the unpatched run's) and the budget's likeness with their 95 %
        intervals, the values of both, ``images``, how many of them ``met`` the budget with the
        interval of that share, and by how much the worst misses it (``short``; 0 if it does not).
    """
    times = [image[name]["seconds"] / image[UNPATCHED]["seconds"] for image in judged]
    values = [image[name][budget.likeness] for image in judged]
    time, likeness = bootstrap(np.stack([times, values], 1), prompts)
    bounded = [1 / time for time in times] if budget.metric == SPEED else values
    met = sum(map(budget.is_met, bounded))
    worst = max(bounded) if budget.metric == "lpips" else min(bounded)
    return {
        "time": time,
        budget.likeness: likeness,
        "values": {"time": times, budget.likeness: values},
        "images": len(judged),
        "met": met,
        "met_share": share_interval(met, len(judged)),
        "worst": worst,
        "short": 0.0 if budget.is_met(worst) else abs(worst - budget.bound),
    }


def share_interval(count: int, total: int, level: float = 0.95) -> Interval:
    """A share with its confidence interval (Wilson, 1927).

    Example:
        >>> [round(end, 2) for end in share_interval(9, 10)]
        [0.9, 0.6, 0.98]
    """
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, spread = count / total, z**2 / total
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * np.sqrt(share * (1 - share) / total + spread / total / 4)
    return Interval(share, float(middle - half), float(middle + half))


def faster_by(judged: Judged, prompts: list[str], name: str, than: str) -> Interval:
    """How much less time a variant takes than another, as a share of that; paired by image."""
    saved = [1 - image[name]["seconds"] / image[than]["seconds"] for image in judged]
    return bootstrap(saved, prompts)[0]
