"""Estimates of a metric with their standard error, and paired differences between two of them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ...errors import EvaluationError
from ..intervals import Interval, normal_interval
from .feature_arrays import Array


class Estimate(NamedTuple):
    """A metric's value for two sets of images, and the influence of each image on it.

    The influences are those of the infinitesimal jackknife (Efron, 1982): their variance over
    their number is the variance of the value. Two values with the same reference are compared
    through the differences of their influences, image by image.
    """

    value: float
    influence: Array  # [N], of each image; their mean is 0
    reference_influence: Array | None = None  # [M]; None where the reference counts as exact

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
        a: Of ``N`` images.
        b: Of as many images, made from the same prompts and seeds, in the same order.
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
