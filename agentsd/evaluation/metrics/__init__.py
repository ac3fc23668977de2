"""Metrics as pure functions: arrays in, figures out, in float64 (LPIPS in its network's dtype).

They know nothing of files, networks or the patch; :mod:`agentsd.evaluation.features` turns images
into the arrays.
"""

from .clip_score import clip_score, cosine_similarity
from .estimates import Estimate, paired_difference
from .fid import fid, fid_bias_warning, fid_infinity
from .kid import kid
from .lpips import lpips_distance
from .precision_recall import precision_recall
from .ssim import ssim
from .statistics import FeatureStatistics, feature_statistics

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
    "lpips_distance",
    "paired_difference",
    "precision_recall",
    "ssim",
]
