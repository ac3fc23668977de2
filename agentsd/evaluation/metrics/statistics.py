"""The mean and covariance of a set of features: all that FID needs of it."""

from __future__ import annotations

from typing import NamedTuple

from numpy.typing import ArrayLike

from .feature_arrays import Array, as_features


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
