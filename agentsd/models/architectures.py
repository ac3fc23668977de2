"""UNets without weights: of well-known models, a folder, or the hub."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from ..errors import LoadError
from ..patching.layers import MODELS
from ..settings import short_repr
from .loading import HUB_ID, POCKET, missing_from_hub

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "sd15": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sd21": {
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "sdxl": {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
"""UNet configurations of Stable Diffusion 1.5, 2.1 and XL, without defaults."""


@dataclass(eq=False)
class Architecture:
    """Stands in for a pipeline if only its architecture is needed.

    Args:
        unet: On PyTorch's meta device: modules and shapes without values.
        vae_scale_factor: Pixels per latent, in each dimension.
    """

    unet: UNet2DConditionModel
    vae_scale_factor: int


def load_architecture(model: str) -> Architecture:
    """Build a model's UNet without its weights, which is quick at any size.

    Args:
        model: ``"pocket"``, a name of :data:`ARCHITECTURES`, a folder in diffusers' format, or the
            id of a model on the Hugging Face hub, from which two small files are downloaded.

    Raises:
        LoadError: If it is none of these, or agentsd does not support its kind of UNet.

    Example:
        >>> load_architecture("sdxl").unet.config.cross_attention_dim
        2048
    """
    if model in ARCHITECTURES:
        with torch.device("meta"):
            return Architecture(UNet2DConditionModel(**ARCHITECTURES[model]), 8)
    place = str(POCKET) if model == "pocket" else model
    if os.path.isfile(place) or not (os.path.isdir(place) or HUB_ID.fullmatch(place)):
        raise LoadError(
            f"{short_repr(model)} is not a folder in diffusers' format, an id of the hub, or one "
            f"of pocket, {', '.join(ARCHITECTURES)}"
        )
    try:
        config = UNet2DConditionModel.load_config(place, subfolder="unet")
        vae = AutoencoderKL.load_config(place, subfolder="vae")
        kind = getattr(diffusers, str(config.get("_class_name")), None)
        if kind not in MODELS:
            names = ", ".join(known.__name__ for known in MODELS)
            raise LoadError(f"its UNet is a {config.get('_class_name')}, not one of {names}")
        with torch.device("meta"):
            unet = kind.from_config(config)
        return Architecture(unet, 2 ** (len(vae["block_out_channels"]) - 1))
    except Exception as error:  # diffusers and the hub raise kinds of their own
        if not os.path.exists(place) and (missing := missing_from_hub(error)):
            raise LoadError(
                f"{short_repr(model)} is neither a local folder {missing}; there are also pocket, "
                f"{', '.join(ARCHITECTURES)}"
            ) from error
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise LoadError(
            f"{short_repr(model)}: its configuration cannot be read ({reason})"
        ) from error
