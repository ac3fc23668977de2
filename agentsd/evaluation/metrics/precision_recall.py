"""Improved precision and recall."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike

from .feature_arrays import BLOCK, Array, as_features, check_dimensions


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
