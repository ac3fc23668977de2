"""Confidence intervals: of means by bootstrap over prompts, and of values with a standard error."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ..errors import EvaluationError

SMALL_SAMPLE = 20
"""Number of images, or prompts, below which figures are unreliable."""


class Interval(NamedTuple):
    """A value with the ends of its confidence interval."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether a difference with this interval is significant."""
        return self.low > 0 or self.high < 0


def normal_interval(mean: float, error: float, level: float = 0.95) -> Interval:
    """The normal confidence interval of a value.

    Args:
        mean: The value.
        error: Its standard error.
        level: Confidence level, in (0, 1).

    Example:
        >>> round(normal_interval(5, 1).high, 2)
        6.96
    """
    half = _z_value(level) * error
    return Interval(mean, mean - half, mean + half)


def _z_value(level: float) -> float:
    """Half the width of a normal interval, in standard errors."""
    return NormalDist().inv_cdf((1 + level) / 2)


def bootstrap(
    values: ArrayLike,
    groups: ArrayLike | None = None,
    *,
    level: float = 0.95,
    resamples: int = 4000,
    seed: int = 0,
) -> list[Interval]:
    """Means with bootstrap intervals, resampling whole groups of images.

    Images of one prompt are correlated, so prompts are resampled, each with all of its seeds. All
    columns share the resamples: the interval of a difference between two columns is paired by
    prompt and seed. With few groups, percentile intervals are too narrow (Hesterberg, 2015, arXiv
    1411.5279); both halves are widened by the ratio of Student's interval to the normal one.

    Args:
        values: ``[N]`` or ``[N, K]``, one column per quantity.
        groups: ``[N]`` labels, for example prompts; by default each image is its own group.
        level: Confidence level, in (0, 1).
        resamples: Number of resamples; more is steadier and takes longer.
        seed: Seed of the resamples, so that intervals can be reproduced.

    Returns:
        One interval per column, in the units of the values. A single group gives no information on
        the spread: the ends are infinite.

    Raises:
        EvaluationError: If there are no values, a value is not finite, or the number of labels
            differs from theirs.

    Example:
        >>> [interval] = bootstrap(range(100))
        >>> interval.mean, interval.low < 45, interval.high > 54
        (49.5, True, True)
    """
    x = np.asarray(values, np.float64)
    x = x[:, None] if x.ndim == 1 else x
    labels = np.arange(len(x)) if groups is None else np.asarray(groups)
    if not x.size or labels.shape != x.shape[:1]:
        raise EvaluationError(
            f"{len(x)} values, {labels.size} groups: each value needs one group label"
        )
    if not np.isfinite(x).all():
        raise EvaluationError("an interval needs finite values; NaN or infinity was measured")
    _, index, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    means = x.mean(0)
    if len(sizes) == 1:
        return [Interval(float(m), -np.inf, np.inf) for m in means]
    sums = np.zeros((len(sizes), x.shape[1]))
    np.add.at(sums, index, x)
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), resamples)
    resampled = weights @ sums / (weights @ sizes)[:, None]  # [R, K]
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2], axis=0)
    stretch = _stretch(level, len(sizes))
    low, high = (means + stretch * (end - means) for end in (low, high))
    return [Interval(*map(float, ends)) for ends in zip(means, low, high, strict=True)]


def _stretch(level: float, groups: int) -> float:
    """The factor by which to widen a percentile interval from few groups."""
    t = student_quantile((1 + level) / 2, groups - 1)
    # The standard deviation of resampled means divides by the number of groups, not by one less.
    return t / _z_value(level) * float(np.sqrt(groups / (groups - 1)))


def student_quantile(probability: float, n: int) -> float:
    """Student's quantile, from the normal one (Abramowitz & Stegun, 26.7.5).

    Args:
        probability: In (0, 1).
        n: Degrees of freedom, 1 or more.

    Example:
        >>> round(student_quantile(0.9, 4), 2)
        1.53
    """
    z = NormalDist().inv_cdf(probability)
    t = z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
    return t + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)


def small_sample_warning(labels: Sequence[str]) -> str | None:
    """A warning for intervals over few prompts; ``None`` if there are enough.

    Example:
        >>> small_sample_warning(["a cat", "a cat", "a dog"])[:44]
        'only 2 prompts: the intervals are wide, and '
        >>> small_sample_warning([str(i) for i in range(20)]) is None
        True
    """
    count = len(set(labels))
    if count >= SMALL_SAMPLE:
        return None
    plural = "prompt" if count == 1 else "prompts"
    return (
        f"only {count} {plural}: the intervals are wide, and the figures only hold for prompts "
        "like these"
    )
