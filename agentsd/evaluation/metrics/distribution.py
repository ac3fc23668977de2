"""Distances between sets of images: FID, KID, and improved precision and recall."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike

from ..intervals import Interval, normal_interval
from .estimates import BLOCK, Array, Estimate, as_features, check_dimensions


class FeatureStatistics(NamedTuple):
    """The Gaussian fitted to a set of features."""

    mean: Array  # [D]
    covariance: Array  # [D, D]


def feature_statistics(features: ArrayLike) -> FeatureStatistics:
    """Mean and unbiased covariance of features.

    Args:
        features: ``[N, D]``, at least two rows, all finite.

    Returns:
        The mean ``[D]`` and the covariance ``[D, D]``, accumulated in float64.

    Raises:
        EvaluationError: If the features have a wrong shape, too few rows, NaN or infinity.

    Example:
        >>> from agentsd.evaluation.metrics import feature_statistics
        >>> feature_statistics([[0, 0], [2, 2]]).covariance.tolist()
        [[2.0, 2.0], [2.0, 2.0]]
    """
    x = as_features(features)
    mean = x.mean(0)
    centred = x - mean
    return FeatureStatistics(mean, centred.T @ centred / (len(x) - 1))


def fid(features: ArrayLike, reference: ArrayLike | FeatureStatistics) -> Estimate:
    """Fréchet inception distance (Heusel et al., 2017, arXiv 1706.08500, equation 6).

    ``|m₁ − m₂|² + Tr C₁ + Tr C₂ − 2 Tr (C₁ C₂)^½``. With ``C = R Rᵀ`` from a symmetric
    eigendecomposition, the last trace is the sum of the singular values of ``R₁ᵀ R₂``: stable, and
    exact for singular covariances, which sets of fewer than ``D + 1`` images have.

    Args:
        features: ``[N, D]``, at least two rows, all finite.
        reference: Features ``[M, D]``, or statistics, which are taken as exact.

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
        seed: Seed of the random subsets.

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
    """A warning for an FID from too few images; ``None`` if there are enough.

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


def kid(features: ArrayLike, reference: ArrayLike) -> Estimate:
    """Kernel inception distance (Bińkowski et al., 2018, arXiv 1801.01401, section 4).

    The unbiased estimate of the squared maximum mean discrepancy under the kernel
    ``(x·y / D + 1)³``, over all images rather than averaged over random subsets, so that it does
    not depend on a seed. Its influences come from leaving out one image at a time.

    Args:
        features: ``[N, D]``, at least three rows, all finite.
        reference: ``[M, D]``, likewise.

    Returns:
        The distance in float64, dimensionless and not multiplied by 1,000, with its influences. It
        is unbiased at any N, so it can be slightly below 0 for similar sets: by about 1/N for a set
        and itself.

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


def precision_recall(features: ArrayLike, reference: ArrayLike, k: int = 3) -> tuple[Array, Array]:
    """Improved precision and recall (Kynkäänniemi et al., 2019, arXiv 1904.06991, equation 1).

    Args:
        features: ``[N, D]``, more than ``k`` rows, all finite.
        reference: ``[M, D]``, likewise.
        k: The ball around an image reaches to its k-th neighbour in its own set.

    Returns:
        Two float64 arrays of zeros and ones: for each image ``[N]`` whether it lies in a ball of
        the reference (their mean is the precision, in [0, 1]), and for each reference image
        ``[M]`` whether it lies in a ball of the images (their mean is the recall).

    Raises:
        EvaluationError: If the features have a wrong shape, too few rows, NaN or infinity, or if
            the dimensions of the two sets differ.

    Example:
        >>> import numpy as np
        >>> from agentsd.evaluation.metrics import precision_recall
        >>> x, y = np.random.default_rng(0).normal(size=(2, 100, 2))
        >>> precision, recall = precision_recall(x / 9, y)  # all images near the centre
        >>> float(precision.mean()), float(recall.mean()) < 0.5
        (1.0, True)
    """
    x, y = (torch.from_numpy(as_features(z, min_rows=k + 1)) for z in (features, reference))
    check_dimensions(x.shape[1], y.shape[1])

    def radii(z: torch.Tensor) -> torch.Tensor:
        # The first neighbour is the image itself.
        blocks = [torch.cdist(block, z).kthvalue(k + 1).values for block in z.split(BLOCK)]
        return torch.cat(blocks)

    def covered(a: torch.Tensor, b: torch.Tensor) -> Array:
        reach = radii(b)
        blocks = [(torch.cdist(block, b) <= reach).any(1) for block in a.split(BLOCK)]
        return np.asarray(torch.cat(blocks).double().numpy())

    return covered(x, y), covered(y, x)
