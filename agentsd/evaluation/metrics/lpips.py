"""Learned perceptual image patch similarity."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def lpips_distance(a: Sequence[Tensor], b: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """LPIPS distance from a network's feature maps (Zhang et al., 2018, arXiv 1801.03924, eq. 1).

    Args:
        a: Feature maps of the images, one ``[B, C, H, W]`` for each layer.
        b: Feature maps of the images to compare with, of the same shapes.
        weights: Channel weights ``[C]``, 0 or more, for each layer.

    Returns:
        ``[B]``, 0 or more (0 for equal images, rarely above 1), in the dtype of the feature maps.

    Example:
        >>> import torch
        >>> from agentsd.evaluation.metrics import lpips_distance
        >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(2, 1, 2, 1, 1)
        >>> lpips_distance([x], [y], [torch.ones(2)])  # orthogonal unit vectors
        tensor([2.])
    """
    total = a[0].new_zeros(len(a[0]))
    for x, y, weight in zip(a, b, weights, strict=True):
        squared = (_unit_vectors(x) - _unit_vectors(y)).square()  # [B, C, H, W]
        total = total + torch.einsum("bchw,c->bhw", squared, weight).mean((1, 2))
    return total


def _unit_vectors(x: Tensor) -> Tensor:
    """Scale the channel vector at each position to length 1."""
    return x / torch.sqrt(x.square().sum(1, keepdim=True) + 1e-8)
