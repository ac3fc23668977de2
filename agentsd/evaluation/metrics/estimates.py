"""Arrays of features, and estimates from them with their standard errors and paired differences."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...errors import EvaluationError
from ..intervals import Interval, normal_interval

Array = NDArray[np.float64]

BLOCK = 1024
"""Rows of a kernel or distance matrix held in memory at once, so that 50,000 images fit."""


def as_features(features: ArrayLike, min_rows: int = 2) -> Array:
    """Convert features to a float64 array ``[N, D]``.

    Args:
        features: ``[N, D]``, one row per image.
        min_rows: Minimum number of images that the metric needs.

    Raises:
        EvaluationError: If the array has another shape, fewer than ``min_rows`` rows, NaN or
            infinity.
    """
    x = np.asarray(features, np.float64)
    if x.ndim != 2 or not x.shape[1]:
        raise EvaluationError(f"features must be [images, dimensions] (got the shape {x.shape})")
    if len(x) < min_rows:
        raise EvaluationError(f"at least {min_rows} images are needed (got {len(x)})")
    bad = np.flatnonzero(~np.isfinite(x).all(1))
    if len(bad):
        raise EvaluationError(
            f"the features of image {bad[0]} (counted from 0; {len(bad)} in all) contain NaN or "
            "infinity; run the extractor in float32"
        )
    return x


def check_dimensions(images: int, reference: int) -> None:
    """Check that two sets have features of the same dimension.

    Raises:
        EvaluationError: If the dimensions differ.
    """
    if images != reference:
        raise EvaluationError(
            f"features of {images} dimensions cannot be compared with {reference}; use the same "
            "extractor for both sets"
        )


class Estimate(NamedTuple):
    """A metric's value for two sets of images, and the influence of each image on it.

    The influences are those of the infinitesimal jackknife (Efron, 1982): their variance over
    their number is the variance of the value. Two values with the same reference are compared
    through the differences of their influences, image by image.
    """

    value: float
    influence: Array  # [N], of each image; their mean is 0
    reference_influence: Array | None = None  # [M]; None if the reference is taken as exact

    @property
    def error(self) -> float:
        """Standard error from the sampling of the images and, where known, of the reference."""
        parts = [p for p in (self.influence, self.reference_influence) if p is not None]
        return float(np.sqrt(sum(np.mean(p**2) / len(p) for p in parts)))

    @property
    def interval(self) -> Interval:
        """The value with its normal 95 % interval."""
        return normal_interval(self.value, self.error)


def paired_difference(a: Estimate, b: Estimate, groups: ArrayLike) -> Interval:
    """Difference of two estimates with the same reference, paired image by image.

    Args:
        a: Estimate from ``N`` images.
        b: Estimate from ``N`` images of the same prompts and seeds, in the same order.
        groups: ``[N]`` labels, such as prompts; images of one group are correlated.

    Returns:
        ``a - b`` with its normal 95 % interval, in the units of the metric.

    Raises:
        EvaluationError: If the numbers of images differ.

    Example:
        >>> import numpy as np
        >>> from agentsd.evaluation.metrics import kid, paired_difference
        >>> x, noise, reference = np.random.default_rng(0).normal(size=(3, 200, 8))
        >>> a, b = kid(x + 1, reference), kid(x + 0.01 * noise, reference)
        >>> paired_difference(a, b, range(200)).excludes_zero
        True
    """
    if a.influence.shape != b.influence.shape:
        raise EvaluationError(
            f"{len(a.influence)} and {len(b.influence)} images cannot be paired; the numbers must "
            "be equal"
        )
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    sums = np.bincount(index, a.influence - b.influence)
    variance = np.sum(sums**2) / len(index) ** 2
    if a.reference_influence is not None and b.reference_influence is not None:
        shift = a.reference_influence - b.reference_influence
        variance += np.mean(shift**2) / len(shift)
    return normal_interval(a.value - b.value, float(np.sqrt(variance)))
