"""LPIPS, where its weights are at hand: AlexNet's from torchvision, the rest from torchmetrics."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor, nn

from ..errors import EvaluationError

FILE = "alexnet-owt-7be5be79.pth"
"""What torchvision calls AlexNet's weights, in the cache of torch's hub."""

CONVOLUTIONS = {  # their names in that file: input and output channels, kernel, stride, padding
    "features.0": (3, 64, 11, 4, 2),
    "features.3": (64, 192, 5, 1, 2),
    "features.6": (192, 384, 3, 1, 1),
    "features.8": (384, 256, 3, 1, 1),
    "features.10": (256, 256, 3, 1, 1),
}


class Lpips(nn.Module):
    """Learned perceptual distance (Zhang et al., 2018, arXiv 1801.03924, equation 1; AlexNet).

    Args:
        weights: Those of torchvision's AlexNet, by the names it gives them.
        linear: Those of the channels, as torchmetrics ships them.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, weights: dict[str, Tensor], linear: dict[str, Tensor]):
        super().__init__()
        self.layers = nn.ModuleList()
        for name, shape in CONVOLUTIONS.items():
            layer = nn.Conv2d(*shape)
            layer.load_state_dict({k: weights[f"{name}.{k}"] for k in ("weight", "bias")})
            self.layers.append(layer)
        self.linear = [linear[f"lin{i}.model.1.weight"].flatten() for i in range(5)]
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]`` in [-1, 1], of 32 pixels or more, to distances ``[B]``."""
        x = (torch.cat([a, b]) - self.shift) / self.scale
        total = torch.zeros(len(a))
        for number, (layer, weight) in enumerate(zip(self.layers, self.linear, strict=True)):
            x = F.max_pool2d(x, 3, 2) if number in (1, 2) else x
            x = F.relu(layer(x))
            unit = x / torch.sqrt(x.square().sum(1, keepdim=True) + 1e-8)
            apart = (unit[: len(a)] - unit[len(a) :]).square()  # [B, C, h, w]
            total = total + torch.einsum("bchw,c->bhw", apart, weight).mean((1, 2))
        return total

    def between(self, a: ArrayLike, b: ArrayLike) -> float:
        """Of two 8-bit images ``[H, W, 3]`` of one size: 0 for equal ones, about 1 at most."""
        x, y = (
            torch.from_numpy(np.asarray(z, np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
            for z in (a, b)
        )
        return float(self(x, y))


def weights_file() -> Path:
    """Where AlexNet's weights belong."""
    return Path(torch.hub.get_dir()) / "checkpoints" / FILE


def load_if_cached() -> Lpips | None:
    """LPIPS, or None if its weights are not there.

    Raises:
        EvaluationError: If they are there and broken.
    """
    file = weights_file()
    if not file.is_file():
        return None
    try:
        shipped = resources.files("torchmetrics") / "functional/image/lpips_models/alex.pth"
        with resources.as_file(shipped) as path:
            linear = torch.load(path, map_location="cpu", weights_only=True)
        return Lpips(torch.load(file, map_location="cpu", weights_only=True), linear)
    except ImportError:
        raise EvaluationError("LPIPS needs torchmetrics: pip install torchmetrics") from None
    except Exception as error:  # what unpickling and copying raise is of many kinds
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise EvaluationError(f"{file}: no weights of AlexNet ({said})") from error
