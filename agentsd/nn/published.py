"""Load the weights that the paper's authors published into these models."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from .bias import Grid, resize, resize_bias

Rules = Sequence[tuple[str, str]]
"""Patterns in published names, and their replacements."""

BIAS = (r"(?<!\.bias)\.((?:an|na|ah|aw|ha|wa|ac|ca)_bias)$", r".bias.\1")
"""The biases, which are parameters of the layer itself in the published code."""


def convert_published(checkpoint: Mapping[str, Any], model: Any) -> dict[str, Tensor]:
    """Rename and resize a published checkpoint's weights for a model of :mod:`agentsd.nn`.

    Biases and position embeddings are resized to the model's image size and number of agents.
    Weights that already have the model's names keep them. timm calls this function for
    ``create_model(name, pretrained=True, pretrained_cfg_overlay={"file": path})``.

    Args:
        checkpoint: What ``torch.load`` returned: a state dict, or one that holds it under
            ``state_dict_ema``, ``state_dict`` or ``model``.
        model: The model that it is for.

    Returns:
        A state dict for ``model.load_state_dict``, which reports what is missing or left over.

    Example:
        >>> weights = torch.load("agent_deit_t.pth", weights_only=True)  # doctest: +SKIP
        >>> model = timm.create_model("agent_deit_tiny", img_size=448)  # doctest: +SKIP
        >>> model.load_state_dict(convert_published(weights, model))  # doctest: +SKIP
    """
    for key in ("state_dict_ema", "state_dict", "model"):
        if isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
            break
    weights: dict[str, Tensor] = model.rename_published(dict(checkpoint))
    wanted = model.state_dict()
    return {
        name: _resized(name, value, model)
        if name in wanted and value.shape != wanted[name].shape
        else value
        for name, value in weights.items()
    }


def renamed(weights: Mapping[str, Tensor], rules: Rules) -> dict[str, Tensor]:
    """The weights, renamed by all rules in order."""
    found = {}
    for name, value in weights.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        found[name] = value
    return found


def resize_position_embedding(embedding: Tensor, old: Grid, new: Grid) -> Tensor:
    """Resize a position embedding ``[1, h·w, C]`` bilinearly from one grid to another."""
    if old == new:
        return embedding
    image = torch.unflatten(embedding.mT, 2, old)  # [1, C, h, w]
    return resize(image, new).flatten(2).mT


def _resized(name: str, value: Tensor, model: Any) -> Tensor:
    """A weight resized to another image size or number of agents; others are returned unchanged."""
    owner, _, own_name = name.rpartition(".")
    if re.search(BIAS[0], f".{own_name}"):
        return resize_bias(own_name, value, tuple(model.get_parameter(name).shape))
    if own_name == "pos_embed":
        side = isqrt(value.shape[1])  # published images are square
        return resize_position_embedding(value, (side, side), model.get_submodule(owner).grid_size)
    return value
