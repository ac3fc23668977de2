"""How sure a mean is: bootstrap intervals over prompts, and differences that are called ones."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import EvaluationError

Array = NDArray[np.float64]

ENOUGH = 20
"""Images, or prompts, below which a figure says little."""


class Interval(NamedTuple):
    """A figure with the ends of its interval."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether a difference with this interval is called one."""
        return self.low > 0 or self.high < 0


def z_value(level: float) -> float:
    """Half the width, in standard errors, of a normal interval.

    Example:
        >>> round(z_value(0.95), 3)
        1.96
    """
    return NormalDist().inv_cdf((1 + level) / 2)


def bootstrap(
    values: ArrayLike,
    groups: ArrayLike | None = None,
    *,
    level: float = 0.95,
    resamples: int = 4000,
    seed: int = 0,
) -> list[Interval]:
    """Means with bootstrap intervals, over whole groups of images.

    Images of one prompt are alike, so prompts are drawn, each with all of its seeds. All columns
    share the draws: the interval of a difference of two columns is paired by prompt and seed. With
    few groups, percentile intervals are too narrow (Hesterberg, 2015, arXiv 1411.5279); both halves
    are stretched by what Student's interval is wider than the normal one.

    Args:
        values: ``[N]`` or ``[N, K]``, a column for each thing that was measured.
        groups: ``[N]`` labels, for example prompts; by default each image is its own group.
        level: Share of the intervals that should hold the truth, in (0, 1).
        resamples: Draws; more is steadier and takes longer.
        seed: Of the draws, so that an interval can be made again.

    Returns:
        An interval for each column. With a single group nothing can be said: the ends are
        infinite.

    Raises:
        EvaluationError: If there is no value, one is not finite, or labels do not match.

    Example:
        >>> [found] = bootstrap(range(100))
        >>> found.mean, found.low < 45, found.high > 54
        (49.5, True, True)
    """
    x = np.asarray(values, np.float64)
    x = x[:, None] if x.ndim == 1 else x
    labels = np.arange(len(x)) if groups is None else np.asarray(groups)
    if not x.size or labels.shape != x.shape[:1]:
        raise EvaluationError(f"{len(x)} values, {labels.size} groups: as many of both are needed")
    if not np.isfinite(x).all():
        raise EvaluationError("an interval needs finite values; NaN or infinity was measured")
    _, index, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    means = x.mean(0)
    if len(sizes) == 1:
        return [Interval(float(m), -np.inf, np.inf) for m in means]
    sums = np.zeros((len(sizes), x.shape[1]))
    np.add.at(sums, index, x)
    draw = np.random.default_rng(seed)
    weights = draw.multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), resamples)
    drawn = weights @ sums / (weights @ sizes)[:, None]  # [R, K]
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0)
    stretch = _stretch(level, len(sizes))
    low, high = (means + stretch * (end - means) for end in (low, high))
    return [Interval(*map(float, ends)) for ends in zip(means, low, high, strict=True)]


def _stretch(level: float, groups: int) -> float:
    """By what to stretch a percentile interval from few groups."""
    z, n = z_value(level), groups - 1
    # Student's quantile from the normal one (Abramowitz & Stegun, 26.7.5); and the deviation of
    # resampled means divides by the number of groups, not by one less.
    t = z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    return t / z * float(np.sqrt(groups / n))


def small_sample_warning(labels: Sequence[str]) -> str | None:
    """What to say of intervals over so few prompts; None where they are enough.

    Example:
        >>> small_sample_warning(["a cat", "a cat", "a dog"])[:44]
        '2 prompts: the intervals are as wide as so f'
        >>> small_sample_warning([str(i) for i in range(20)]) is None
        True
    """
    count = len(set(labels))
    if count >= ENOUGH:
        return None
    return (
        f"{count} prompts: the intervals are as wide as so few allow, and speak of prompts like "
        "these alone"
    )
