"""Metrics as pure functions: arrays in, figures out, in float64.

They do not know files, networks or the patch; :mod:`agentsd.evaluation.features` turns images
into the arrays.
"""

from .distribution import (
    FeatureStatistics,
    feature_statistics,
    fid,
    fid_bias_warning,
    fid_infinity,
    kid,
    precision_recall,
)
from .estimates import Estimate, paired_difference
from .per_image import clip_score, cosine_similarity, ssim

__all__ = [
    "Estimate",
    "FeatureStatistics",
    "clip_score",
    "cosine_similarity",
    "feature_statistics",
    "fid",
    "fid_bias_warning",
    "fid_infinity",
    "kid",
    "paired_difference",
    "precision_recall",
    "ssim",
]
