"""Metrics of single images: SSIM to another image, CLIP score, and cosine similarity."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike

from ...errors import EvaluationError, MissingPackageError
from .estimates import Array, as_features


def ssim(a: ArrayLike, b: ArrayLike) -> float:
    """Structural similarity of two 8-bit images (Wang et al., 2004), computed by torchmetrics.

    The window is a Gaussian of 11 × 11 pixels with sigma 1.5.

    Args:
        a: ``[H, W, 3]``, values 0 to 255; each side at least 11 pixels.
        b: Likewise, of the same shape.

    Returns:
        The mean over pixels and channels, computed in float64, in [-1, 1]; 1 for equal images.

    Raises:
        EvaluationError: If the images are too small.
        MissingPackageError: If torchmetrics is not installed.

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
        raise MissingPackageError("torchmetrics", "SSIM", "evaluate") from error
    x, y = (torch.from_numpy(np.asarray(z, np.float64)).permute(2, 0, 1)[None] for z in (a, b))
    if min(x.shape[2:]) < 11:
        raise EvaluationError(
            f"SSIM needs images of at least 11 pixels a side (got {x.shape[3]}×{x.shape[2]})"
        )
    return float(structural_similarity_index_measure(x, y, data_range=255.0))


def cosine_similarity(a: ArrayLike, b: ArrayLike) -> Array:
    """Cosine similarity of two arrays of embeddings, row by row.

    Args:
        a: ``[N, D]``, all finite.
        b: ``[N, D]``, likewise.

    Returns:
        ``[N]``, float64, in [-1, 1]; 0 where a row is zero.

    Raises:
        EvaluationError: If the shapes differ, or a value is NaN or infinite.

    Example:
        >>> from agentsd.evaluation.metrics import cosine_similarity
        >>> cosine_similarity([[1, 0], [1, 1]], [[2, 0], [1, -1]]).tolist()
        [1.0, 0.0]
    """
    x, y = as_features(a, min_rows=1), as_features(b, min_rows=1)
    if x.shape != y.shape:
        raise EvaluationError(
            f"the two arrays must have the same shape (got {x.shape} and {y.shape})"
        )
    lengths = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    return np.asarray(np.einsum("nd,nd->n", x, y) / np.maximum(lengths, 1e-300))


def clip_score(images: ArrayLike, texts: ArrayLike) -> Array:
    """CLIP score of each image with its prompt (Hessel et al., 2021, arXiv 2104.08718).

    As torchmetrics defines it: 100 times the cosine similarity. torchmetrics reports the mean over
    a set, clamped at 0.

    Args:
        images: CLIP embeddings of the images, ``[N, D]``, all finite.
        texts: CLIP embeddings of their prompts, ``[N, D]``, likewise.

    Returns:
        ``[N]``, float64, in [-100, 100].

    Raises:
        EvaluationError: If the shapes differ, or a value is NaN or infinite.

    Example:
        >>> from agentsd.evaluation.metrics import clip_score
        >>> clip_score([[3, 4]], [[4, 3]]).round(6).tolist()
        [96.0]
    """
    return 100 * cosine_similarity(images, texts)
