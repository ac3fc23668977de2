"""Muon for the matrices within the denoiser, AdamW for all else."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextModel

MATRIX_RATE = 2e-3  # Muon's, scaled to the size of AdamW's updates
REST_RATE = 1e-3  # AdamW's: norms, biases, the first and last convolution
TEXT_RATE = 3e-4  # AdamW's, for the text encoder, which is pretrained


class Muon(torch.optim.Muon):
    """Muon, also for convolutions: each weight is a matrix with a row per output channel."""

    def __init__(self, weights: list[torch.nn.Parameter], rate: float):
        self.weights = weights
        self.matrices = [torch.nn.Parameter(w.detach().flatten(1)) for w in weights]  # shared
        super().__init__(self.matrices, rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update the weights from their gradients."""
        for matrix, weight in zip(self.matrices, self.weights, strict=True):
            matrix.grad = None if weight.grad is None else weight.grad.flatten(1)
        super().step(closure)


def build_optimisers(
    unet: UNet2DConditionModel, text: CLIPTextModel, reader: torch.nn.Module
) -> list:
    """Muon for the matrices within the denoiser, AdamW for all else."""
    ends = {id(p) for part in (unet.conv_in, unet.conv_out) for p in part.parameters()}
    matrices = [p for p in unet.parameters() if p.ndim > 1 and id(p) not in ends]
    within = {id(p) for p in matrices}
    rest = [p for p in unet.parameters() if id(p) not in within]
    groups = [
        {"params": [*rest, *reader.parameters()], "lr": REST_RATE},
        {"params": list(text.parameters()), "lr": TEXT_RATE},
    ]
    optimisers = [
        Muon(matrices, MATRIX_RATE),
        torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.01),
    ]
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["peak"] = group["lr"]
    return optimisers
