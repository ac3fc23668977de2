"""Feature statistics as files, in pytorch-fid's format."""

from __future__ import annotations

from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from ...errors import EvaluationError
from ..metrics import FeatureStatistics


def load_statistics(path: str | Path) -> FeatureStatistics:
    """Load reference statistics from an ``.npz`` with ``mu`` and ``sigma``, as pytorch-fid writes.

    Raises:
        EvaluationError: If the file cannot be read or does not contain them.
    """
    try:
        with np.load(path) as file:
            statistics = FeatureStatistics(
                *(np.asarray(file[key], np.float64) for key in ("mu", "sigma"))
            )
    except (OSError, ValueError, KeyError, EOFError, AttributeError, BadZipFile) as error:
        raise EvaluationError(
            f"{path}: not an .npz of statistics with mu and sigma, as pytorch-fid writes ({error})"
        ) from None
    size = statistics.mean.size
    if statistics.mean.shape != (size,) or statistics.covariance.shape != (size, size):
        shapes = f"{statistics.mean.shape} and {statistics.covariance.shape}"
        raise EvaluationError(f"{path}: mu and sigma must be [D] and [D, D] (got {shapes})")
    if not all(np.isfinite(part).all() for part in statistics):
        raise EvaluationError(f"{path}: the statistics contain NaN or infinity")
    return statistics


def save_statistics(path: str | Path, statistics: FeatureStatistics) -> None:
    """Save statistics in a form that pytorch-fid can read, too.

    Raises:
        EvaluationError: If the file cannot be written.
    """
    try:
        np.savez_compressed(path, mu=statistics.mean, sigma=statistics.covariance)
    except OSError as error:
        raise EvaluationError(f"cannot write {path}: {error.strerror or error}") from error
