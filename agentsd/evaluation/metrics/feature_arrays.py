"""Arrays of features: the checks that all metrics share."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...errors import EvaluationError

Array = NDArray[np.float64]

BLOCK = 1024
"""Rows of a kernel or distance matrix held in memory at once, so that 50,000 images fit."""


def as_features(features: ArrayLike, min_rows: int = 2) -> Array:
    """Convert features to a float64 array ``[N, D]``.

    Args:
        features: ``[N, D]``, one row per image.
        min_rows: The fewest images that the metric can use.

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
        EvaluationError: If they do not.
    """
    if images != reference:
        raise EvaluationError(
            f"features of {images} dimensions cannot be compared with {reference}; use the same "
            "extractor for both sets"
        )
