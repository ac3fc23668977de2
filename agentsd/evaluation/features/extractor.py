"""A network that turns images into features."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from .cache import Floats


class Extractor:
    """A network that turns images into features.

    Args:
        network: Holds the weights; moved to ``device``.
        kind: Its name in the cache.
        settings: Everything besides the weights that the features depend on, as text.
        embed: Maps images (RGB, of one size) and a device to features ``[B, D]``.
        device: Where to run it.
    """

    def __init__(
        self,
        network: nn.Module,
        kind: str,
        settings: str,
        embed: Callable[[list[Image.Image], torch.device], Tensor],
        device: str | torch.device = "cpu",
    ):
        self.device = torch.device(device)
        self.network = network.to(self.device)
        self.embed = embed
        self.identity = f"{kind}-{_fingerprint(network, settings)}"

    @torch.no_grad()
    def __call__(self, images: list[Image.Image]) -> Floats:
        """Compute the features ``[B, D]`` of RGB images of one size."""
        return np.asarray(self.embed(images, self.device).float().cpu().numpy())


def _fingerprint(network: nn.Module, settings: str) -> str:
    """Hash the settings and a sample of every weight, so that each revision has its own cache."""
    sha = hashlib.sha256(settings.encode())
    for name, tensor in sorted(network.state_dict().items()):
        flat = tensor.flatten()
        sample = flat[:: max(1, len(flat) // 64)].double().cpu()
        sha.update(f"{name}{tuple(tensor.shape)}".encode() + sample.numpy().tobytes())
    return sha.hexdigest()[:16]
