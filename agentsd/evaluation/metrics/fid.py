"""Fréchet inception distance."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from ..intervals import Interval, normal_interval
from .estimates import Estimate
from .feature_arrays import Array, as_features, check_dimensions
from .statistics import FeatureStatistics, feature_statistics


def fid(features: ArrayLike, reference: ArrayLike | FeatureStatistics) -> Estimate:
    """Fréchet inception distance (Heusel et al., 2017, arXiv 1706.08500, equation 6).

    ``|m₁ − m₂|² + Tr C₁ + Tr C₂ − 2 Tr (C₁ C₂)^½``. With ``C = R Rᵀ`` from a symmetric
    eigendecomposition, the last trace is the sum of the singular values of ``R₁ᵀ R₂``: stable, and
    exact for singular covariances, which sets of fewer than ``D + 1`` images have.

    Args:
        features: ``[N, D]``, at least two rows, all finite.
        reference: Features ``[M, D]``, or statistics, which then count as exact.

    Returns:
        The distance in float64, in squared units of the features, in [0, ∞) (0 for equal sets),
        with its influences. It is biased upwards by a term that shrinks as 1/N: compare only equal
        N, or see :func:`fid_infinity`.

    Raises:
        EvaluationError: If the features have a wrong shape, too few rows, NaN or infinity, or if
            the dimensions of the two sets differ.

    Example:
        >>> import numpy as np
        >>> from agentsd.evaluation.metrics import fid
        >>> x = np.random.default_rng(0).normal(size=(500, 4))
        >>> round(fid(x, x + 3).value, 6)  # shifted by 3 in each of four dimensions
        36.0
    """
    x = as_features(features)
    y = None if isinstance(reference, FeatureStatistics) else as_features(reference)
    ours = feature_statistics(x)
    theirs = _statistics_of(reference)
    check_dimensions(ours.mean.size, theirs.mean.size)
    gap = ours.mean - theirs.mean
    root, inverse = _root(ours.covariance)
    their_root, their_inverse = _root(theirs.covariance)
    left, overlap, right = np.linalg.svd(root.T @ their_root, full_matrices=False)
    traces = np.trace(ours.covariance) + np.trace(theirs.covariance)
    value = max(0.0, float(gap @ gap + traces - 2 * overlap.sum()))

    def influence(rows: Array, gap: Array, rotation: Array) -> Array:
        # The derivative with respect to a covariance is 1 − T, where T is the optimal transport
        # map between the Gaussians; here as a quadratic form of each centred image.
        rotated = rows @ rotation
        raw = 2 * rows @ gap + (rows**2).sum(1) - rotated**2 @ overlap
        return np.asarray(raw - raw.mean())

    image_influence = influence(x - ours.mean, gap, inverse @ left)
    if y is None:
        return Estimate(value, image_influence)
    return Estimate(
        value, image_influence, influence(y - theirs.mean, -gap, their_inverse @ right.T)
    )


def _statistics_of(reference: ArrayLike | FeatureStatistics) -> FeatureStatistics:
    if isinstance(reference, FeatureStatistics):
        return reference
    return feature_statistics(reference)


def _root(covariance: Array) -> tuple[Array, Array]:
    """``R`` ``[D, r]`` with ``R Rᵀ`` the covariance, ``r`` its rank, and ``R⁺ᵀ`` ``[D, r]``."""
    values, vectors = np.linalg.eigh(covariance)
    positive = values > max(values[-1], 0) * len(values) * np.finfo(np.float64).eps
    scale = np.sqrt(values[positive])
    return vectors[:, positive] * scale, vectors[:, positive] / scale


def fid_infinity(
    features: ArrayLike,
    reference: ArrayLike | FeatureStatistics,
    *,
    points: int = 15,
    seed: int = 0,
) -> Interval:
    """FID extrapolated to infinitely many images (Chong & Forsyth, 2020, arXiv 1911.07023, sec. 3).

    Fits a line in 1/N to the FIDs of random subsets of N/10 to N images; its intercept is the
    value at 1/N = 0.

    Args:
        features: ``[N, D]``, at least 20 rows, all finite.
        reference: As for :func:`fid`; the bias from its own size remains.
        points: Number of subset sizes, at least 3; more is steadier and takes longer.
        seed: Of the random subsets.

    Returns:
        The intercept in float64, in squared units of the features, with the 95 % interval of the
        fit.

    Raises:
        EvaluationError: As for :func:`fid`, or if there are fewer than 20 images.

    Example:
        >>> import numpy as np
        >>> from agentsd.evaluation.metrics import fid, fid_infinity
        >>> x, y = np.random.default_rng(0).normal(size=(2, 4000, 8))
        >>> fid_infinity(x, y).mean < fid(x, y).value
        True
    """
    x = as_features(features, min_rows=20)
    exact = _statistics_of(reference)
    rng = np.random.default_rng(seed)
    sizes = np.linspace(len(x) / 10, len(x), points).astype(int)
    values = np.array([fid(x[rng.choice(len(x), n, replace=False)], exact).value for n in sizes])
    design = np.stack([np.ones(points), 1 / sizes], 1)
    line, *_ = np.linalg.lstsq(design, values, rcond=None)
    residual = values - design @ line
    variance = residual @ residual / (points - 2) * np.linalg.inv(design.T @ design)[0, 0]
    return normal_interval(float(line[0]), float(np.sqrt(variance)))


def fid_bias_warning(images: int, dimensions: int) -> str | None:
    """A warning for an FID from too few images; ``None`` where they are enough.

    Example:
        >>> fid_bias_warning(50000, 2048) is None
        True
    """
    if images > dimensions:
        return None
    return (
        f"{images} images are not more than the {dimensions} dimensions of the features: their "
        "covariance is singular and FID is mostly bias; rely on KID, and on differences at equal N"
    )
