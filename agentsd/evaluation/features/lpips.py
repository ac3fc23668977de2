"""The LPIPS network: AlexNet with torchvision's weights, and torchmetrics' channel weights.

Implemented here because torchmetrics and torch-fidelity both build theirs with torchvision.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor, nn

from ...errors import EvaluationError, MissingPackageError

FILE = "alexnet-owt-7be5be79.pth"
"""torchvision's name for AlexNet's weights in the cache of torch.hub."""

CONVOLUTIONS = {  # by name in that file: input and output channels, kernel, stride, padding
    "features.0": (3, 64, 11, 4, 2),
    "features.3": (64, 192, 5, 1, 2),
    "features.6": (192, 384, 3, 1, 1),
    "features.8": (384, 256, 3, 1, 1),
    "features.10": (256, 256, 3, 1, 1),
}


class Lpips(nn.Module):
    """Learned perceptual image patch similarity (Zhang et al., 2018, arXiv 1801.03924; AlexNet).

    Args:
        weights: Weights of torchvision's AlexNet, under its names.
        channels: Channel weights of each layer, as torchmetrics ships them.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, weights: dict[str, Tensor], channels: dict[str, Tensor]):
        super().__init__()
        self.layers = nn.ModuleList()
        for name, shape in CONVOLUTIONS.items():
            layer = nn.Conv2d(*shape)
            layer.load_state_dict({k: weights[f"{name}.{k}"] for k in ("weight", "bias")})
            self.layers.append(layer)
        self.channels = [channels[f"lin{i}.model.1.weight"].flatten() for i in range(5)]
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distances ``[B]`` of images ``[B, 3, H, W]`` in [-1, 1], each side at least 32 pixels."""
        total = a.new_zeros(len(a))
        for x, weight in zip(self.feature_maps(torch.cat([a, b])), self.channels, strict=True):
            unit = x / torch.sqrt(x.square().sum(1, keepdim=True) + 1e-8)
            squared = (unit[: len(a)] - unit[len(a) :]).square()  # [B, C, H, W]
            total = total + torch.einsum("bchw,c->bhw", squared, weight).mean((1, 2))  # equation 1
        return total

    def feature_maps(self, x: Tensor) -> list[Tensor]:
        """The outputs ``[B, C, H, W]`` of the five convolutions, after the ReLU."""
        x = (x - self.shift) / self.scale
        maps = []
        for number, layer in enumerate(self.layers):
            x = F.max_pool2d(x, 3, 2) if number in (1, 2) else x
            x = F.relu(layer(x))
            maps.append(x)
        return maps

    def between(self, a: ArrayLike, b: ArrayLike) -> float:
        """Distance of two 8-bit images ``[H, W, 3]`` of the same size; 0 for identical images."""
        x, y = (
            torch.from_numpy(np.asarray(z, np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
            for z in (a, b)
        )
        return float(self(x, y))


def weights_file() -> Path:
    """Where AlexNet's weights are expected."""
    return Path(torch.hub.get_dir()) / "checkpoints" / FILE


def load_if_cached() -> Lpips | None:
    """Load LPIPS, or return ``None`` if its weights are not in the cache of torch.hub.

    Raises:
        EvaluationError: If the weights are broken.
        MissingPackageError: If torchmetrics is not installed.
    """
    file = weights_file()
    if not file.is_file():
        return None
    try:
        shipped = resources.files("torchmetrics") / "functional/image/lpips_models/alex.pth"
        with resources.as_file(shipped) as path:
            channels = torch.load(path, map_location="cpu", weights_only=True)
        return Lpips(torch.load(file, map_location="cpu", weights_only=True), channels)
    except ImportError as error:
        raise MissingPackageError("torchmetrics", "LPIPS", "evaluate") from error
    except Exception as error:  # unpickling and copying raise errors of many types
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise EvaluationError(f"{file}: not AlexNet's weights ({reason})") from error
