"""CLIP score, and the cosine similarity that it is made of."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from ...errors import EvaluationError
from .feature_arrays import Array, as_features


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
