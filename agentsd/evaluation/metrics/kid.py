"""Kernel inception distance."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from .estimates import Estimate
from .feature_arrays import BLOCK, Array, as_features, check_dimensions


def kid(features: ArrayLike, reference: ArrayLike) -> Estimate:
    """Kernel inception distance (Bińkowski et al., 2018, arXiv 1801.01401, section 4).

    The unbiased estimate of the squared maximum mean discrepancy under the kernel
    ``(x·y / D + 1)³``, over all images rather than averaged over random subsets, so that it does
    not depend on a seed. Its influences are those of leaving one image out.

    Args:
        features: ``[N, D]``, at least three rows, all finite.
        reference: ``[M, D]``, likewise.

    Returns:
        The distance in float64, dimensionless and not multiplied by 1,000, with its influences. It
        is unbiased at any N, and so can fall a little below 0 for similar sets: for a set with
        itself by about 1/N.

    Raises:
        EvaluationError: If the features have a wrong shape, too few rows, NaN or infinity, or if
            the dimensions of the two sets differ.

    Example:
        >>> import numpy as np
        >>> from agentsd.evaluation.metrics import kid
        >>> x, y = np.random.default_rng(0).normal(size=(2, 300, 8))
        >>> kid(x, y + 1).value > 1 > kid(x, y).value
        True
    """
    x, y = as_features(features, min_rows=3), as_features(reference, min_rows=3)
    check_dimensions(x.shape[1], y.shape[1])
    n, m = len(x), len(y)
    within, their_within = (_kernel_sums(z, z) - _kernel(z, z) for z in (x, y))
    across, their_across = _kernel_sums(x, y), _kernel_sums(y, x)
    total, their_total, shared = within.sum(), their_within.sum(), across.sum()
    ours, theirs = total / (n * (n - 1)), their_total / (m * (m - 1))
    value = float(ours + theirs - 2 * shared / (n * m))

    def influence(total: float, within: Array, across: Array, others: int) -> Array:
        k = len(within)
        left_out = (total - 2 * within) / ((k - 1) * (k - 2))
        left_out -= 2 * (shared - across) / ((k - 1) * others)
        raw = (k - 1) * (left_out.mean() - left_out)
        return np.asarray(raw * np.sqrt(k / (k - 1)))  # so that the error is the jackknife's

    image_influence = influence(total, within, across, m)
    return Estimate(value, image_influence, influence(their_total, their_within, their_across, n))


def _kernel(x: Array, y: Array) -> Array:
    """The kernel of ``x`` and ``y`` ``[N, D]``, row by row: ``[N]``."""
    return np.asarray((np.einsum("nd,nd->n", x, y) / x.shape[1] + 1) ** 3)


def _kernel_sums(x: Array, y: Array) -> Array:
    """For each row of ``x`` the sum of the kernel over the rows of ``y``: ``[N]``."""
    blocks = (x[i : i + BLOCK] for i in range(0, len(x), BLOCK))
    return np.concatenate([((b @ y.T / x.shape[1] + 1) ** 3).sum(1) for b in blocks])
