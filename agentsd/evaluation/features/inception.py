"""The Inception network of FID, for its weights of 2015-12-05.

Implemented here because torch-fidelity, whose network torchmetrics uses, imports torchvision.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import EvaluationError

FILES = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")
"""File names of the weights in pytorch-fid and torch-fidelity; the files are identical."""

DIGEST = "6726825d"
"""First digits of the SHA-256 of the standard weights."""

SIDE = 299

Branch = list[tuple[str, int, int | tuple[int, int]]]
"""Consecutive convolutions: name, output channels, kernel."""


def weights_file(path: Path | None = None) -> Path:
    """Find the weights: the given file, or one in the cache of torch.hub.

    Raises:
        EvaluationError: If there is no file (says where to get it), or it is not the standard one.
    """
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    choices = [path] if path else [cache / name for name in FILES]
    file = next((choice for choice in choices if choice.is_file()), None)
    if file is None:
        raise EvaluationError(
            f"no Inception weights at {choices[0]}; get {FILES[0]} from the releases of "
            f"mseitzer/pytorch-fid on GitHub (tag fid_weights) and put it into {cache}, or pass "
            "its path as --features inception:PATH"
        )
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if not digest.startswith(DIGEST):
        raise EvaluationError(
            f"{file} is not the standard weights file (SHA-256 {digest[:8]}…, expected "
            f"{DIGEST}…); FIDs from other weights cannot be compared: get {FILES[0]} again"
        )
    return file


def load(path: Path) -> Inception:
    """Load the network with the weights that :func:`weights_file` found.

    Raises:
        EvaluationError: If the file does not contain the weights of this network.
    """
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        network = Inception()
        # The classifier is not used; weights this old have no batch counts.
        expected = {k for k in network.state_dict() if not k.endswith("num_batches_tracked")}
        given = {k: v for k, v in weights.items() if k in expected}
        if missing := sorted(expected - given.keys()):
            raise EvaluationError(f"{path} lacks {missing[0]} and {len(missing) - 1} more weights")
        network.load_state_dict(given, strict=False)
    except EvaluationError:
        raise
    except Exception as error:  # unpickling and copying raise errors of many types
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise EvaluationError(
            f"{path}: not the weights of the Inception network ({reason})"
        ) from error
    return network.eval().requires_grad_(False)


class _Convolution(nn.Module):
    def __init__(
        self, inputs: int, outputs: int, kernel: int | tuple[int, int], stride: int, padding: bool
    ):
        super().__init__()
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        around = (sides[0] // 2, sides[1] // 2) if padding else (0, 0)
        self.conv = nn.Conv2d(inputs, outputs, sides, stride, around, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class _Mixed(nn.Module):
    """Parallel branches; the last one starts with a pooling.

    Branches that fork share their first layers, by name, and compute them twice.
    """

    def __init__(self, inputs: int, branches: list[Branch], pool: str = "average"):
        super().__init__()
        self.pool = pool
        self.branches = [[name for name, _, _ in branch] for branch in branches]
        for branch in branches:
            width = inputs
            for number, (name, outputs, kernel) in enumerate(branch, start=1):
                stride = 2 if pool == "halve" and number == len(branch) else 1
                if not hasattr(self, name):
                    layer = _Convolution(width, outputs, kernel, stride, padding=stride == 1)
                    setattr(self, name, layer)
                width = outputs

    def forward(self, x: Tensor) -> Tensor:
        outputs = [x] * (len(self.branches) - 1) + [self._pooled(x)]
        for number, branch in enumerate(self.branches):
            for name in branch:
                outputs[number] = getattr(self, name)(outputs[number])
        return torch.cat(outputs, 1)

    def _pooled(self, x: Tensor) -> Tensor:
        if self.pool == "halve":
            return F.max_pool2d(x, 3, 2)
        if self.pool == "max":  # in the last block of these weights, unlike the paper
            return F.max_pool2d(x, 3, 1, 1)
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def _a(pool: int) -> list[Branch]:
    return [
        [("branch1x1", 64, 1)],
        [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
        [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
        [("branch_pool", pool, 1)],
    ]


def _c(width: int) -> list[Branch]:
    return [
        [("branch1x1", 192, 1)],
        [("branch7x7_1", width, 1), ("branch7x7_2", width, (1, 7)), ("branch7x7_3", 192, (7, 1))],
        [
            *(("branch7x7dbl_1", width, 1), ("branch7x7dbl_2", width, (7, 1))),
            *(("branch7x7dbl_3", width, (1, 7)), ("branch7x7dbl_4", width, (7, 1))),
            ("branch7x7dbl_5", 192, (1, 7)),
        ],
        [("branch_pool", 192, 1)],
    ]


B: list[Branch] = [
    [("branch3x3", 384, 3)],
    [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
    [],
]
D: list[Branch] = [
    [("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3)],
    [
        *(("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, (1, 7))),
        *(("branch7x7x3_3", 192, (7, 1)), ("branch7x7x3_4", 192, 3)),
    ],
    [],
]
E: list[Branch] = [
    [("branch1x1", 320, 1)],
    [("branch3x3_1", 384, 1), ("branch3x3_2a", 384, (1, 3))],
    [("branch3x3_1", 384, 1), ("branch3x3_2b", 384, (3, 1))],
    [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3), ("branch3x3dbl_3a", 384, (1, 3))],
    [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3), ("branch3x3dbl_3b", 384, (3, 1))],
    [("branch_pool", 192, 1)],
]


class Inception(nn.Module):
    """Computes the 2,048 features after the last pooling (Szegedy et al., 2015).

    The conventions are pytorch-fid's: 8-bit RGB divided by 255, resized bilinearly to 299 × 299
    without antialiasing and without aligned corners, then scaled to [-1, 1]. torch-fidelity's
    differ slightly.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Convolution(3, 32, 3, 2, False)
        self.Conv2d_2a_3x3 = _Convolution(32, 32, 3, 1, False)
        self.Conv2d_2b_3x3 = _Convolution(32, 64, 3, 1, True)
        self.Conv2d_3b_1x1 = _Convolution(64, 80, 1, 1, False)
        self.Conv2d_4a_3x3 = _Convolution(80, 192, 3, 1, False)
        self.Mixed_5b, self.Mixed_5c = _Mixed(192, _a(32)), _Mixed(256, _a(64))
        self.Mixed_5d, self.Mixed_6a = _Mixed(288, _a(64)), _Mixed(288, B, "halve")
        self.Mixed_6b, self.Mixed_6c = _Mixed(768, _c(128)), _Mixed(768, _c(160))
        self.Mixed_6d, self.Mixed_6e = _Mixed(768, _c(160)), _Mixed(768, _c(192))
        self.Mixed_7a, self.Mixed_7b = _Mixed(768, D, "halve"), _Mixed(1280, E)
        self.Mixed_7c = _Mixed(2048, E, "max")

    def forward(self, images: Tensor) -> Tensor:
        """Features ``[B, 2048]`` of 8-bit images ``[B, 3, H, W]``."""
        x = images.to(self.Conv2d_1a_3x3.conv.weight.dtype) / 255
        x = F.interpolate(x, (SIDE, SIDE), mode="bilinear", align_corners=False)
        return self.features(2 * x - 1)

    def features(self, x: Tensor) -> Tensor:
        """Features ``[B, 2048]`` of images ``[B, 3, 299, 299]`` in [-1, 1]."""
        for name, module in self.named_children():
            x = module(x)
            if name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3"):
                x = F.max_pool2d(x, 3, 2)
        return x.mean((2, 3))
