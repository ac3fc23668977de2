"""What can be timed: an architecture, the size of its latents, and how it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from ..models.architectures import ARCHITECTURES
from ..models.loading import load_pipeline

TIMED: dict[str, dict[str, Any]] = {
    **ARCHITECTURES,
    "sd15-top": {
        **ARCHITECTURES["sd15"],
        "block_out_channels": (320,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "mid_block_type": None,
        "layers_per_block": 1,
    },
}
"""Architectures to time. ``sd15-top`` is one block of ``sd15`` at its highest resolution, for sizes
at which the whole UNet would be too slow."""

MODELS = (*TIMED, "pocket")


@dataclass(frozen=True)
class Case:
    """What is timed.

    Args:
        model: One of :data:`MODELS`.
        height: Of the latents, 8 or more.
        width: Likewise.
        batch: UNet batch size; one guided image counts as 2.
        dtype: Name of a floating-point type of PyTorch.
        device: Where to run.
        compiled: Whether ``torch.compile`` compiles the UNet.
    """

    model: str = "sd15"
    height: int = 64
    width: int = 64
    batch: int = 2
    dtype: str = "float32"
    device: str = "cpu"
    compiled: bool = False


def build(case: Case) -> UNet2DConditionModel:
    """Build the UNet of a case: with random weights, except for ``pocket``."""
    dtype = getattr(torch, case.dtype)
    if case.model == "pocket":
        return load_pipeline("pocket", device=case.device, dtype=case.dtype).unet
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device(case.device):
            return UNet2DConditionModel(sample_size=case.height, **TIMED[case.model]).eval()
    finally:
        torch.set_default_dtype(before)
