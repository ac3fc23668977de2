"""Structural similarity."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike

from ...errors import EvaluationError


def ssim(a: ArrayLike, b: ArrayLike) -> float:
    """Structural similarity of two 8-bit images (Wang et al., 2004), computed by torchmetrics.

    The window is a Gaussian of 11 × 11 pixels with sigma 1.5.

    Args:
        a: ``[H, W, 3]``, values 0 to 255; each side at least 11 pixels.
        b: Likewise, of the same shape.

    Returns:
        The mean over pixels and channels, computed in float64, in [-1, 1]; 1 for equal images.

    Raises:
        EvaluationError: If torchmetrics is not installed or the images are too small.

    Example:
        >>> import numpy as np
        >>> from agentsd.evaluation.metrics import ssim
        >>> x = np.random.default_rng(0).integers(0, 256, (16, 16, 3))
        >>> round(ssim(x, x), 6)
        1.0
    """
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError as error:
        raise EvaluationError(
            f"SSIM requires torchmetrics; run `pip install torchmetrics` ({error})"
        ) from None
    x, y = (torch.from_numpy(np.asarray(z, np.float64)).permute(2, 0, 1)[None] for z in (a, b))
    if min(x.shape[2:]) < 11:
        raise EvaluationError(
            f"SSIM needs images of at least 11 pixels a side (got {x.shape[3]}×{x.shape[2]})"
        )
    return float(structural_similarity_index_measure(x, y, data_range=255.0))
