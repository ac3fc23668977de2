"""Weights and images made from a formula, so that files need to hold only shapes and results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def noise(shape: Iterable[int], key: int) -> Tensor:
    """Numbers in [-1, 1) that depend on shape and key alone, the same in every PyTorch."""
    x = torch.zeros(*shape, dtype=torch.float64)
    places = torch.arange(x.numel(), dtype=torch.float64).view_as(x)
    return (torch.sin(12.9898 * places + 78.233 * key) * 43758.5453) % 2 - 1


def filled(shapes: Mapping[str, Iterable[int]]) -> dict[str, Tensor]:
    """Weights of the given shapes, no two alike, and large enough for each to matter."""
    weights = {}
    for key, (name, shape) in enumerate(shapes.items()):
        weight = noise(shape, key)
        if "norm" in name and name.endswith("weight"):
            weight = 1 + 0.3 * weight
        elif "bias" not in name and weight.dim() > 1:
            weight *= 1.5 * weight[0].numel() ** -0.5
        weights[name] = weight
    return weights


def images(size: int) -> Tensor:
    """Two images ``[2, 3, size, size]``."""
    return noise((2, 3, size, size), 0)
