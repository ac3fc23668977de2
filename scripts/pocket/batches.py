"""Endless training data in which sample i is a pure function of (seed, i)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from .scenes import caption, labels, render, sample_scene, shape_map
from .variants import draw_variants


class ScenePictures(Dataset):
    """Pictures and captions by number: the same number gives the same sample, always.

    Args:
        seed: names the stream; training and evaluation use different ones.
        size: side of the pictures in pixels.
        first: number of the first sample, so that a resumed run goes on where it was.
    """

    def __init__(self, seed: int, size: int, first: int = 0):
        self.seed, self.size, self.first = seed, size, first

    def __len__(self) -> int:
        return 2**40

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        """Return a uint8 picture [3, size, size] and its caption."""
        scene = sample_scene(np.random.default_rng((self.seed, self.first + index)))
        return torch.from_numpy(render(scene, self.size)).permute(2, 0, 1), caption(scene)


class HardGroups(ScenePictures):
    """Groups of four scenes: one and three that differ from it in one attribute each."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, list[str], torch.Tensor, torch.Tensor]:
        """Return uint8 pictures [4, 3, size, size], their captions, their labels [4, 6] and which
        shape is where [4, 8, 8]."""
        rng = np.random.default_rng((self.seed, self.first + index))
        scene = sample_scene(rng)
        scenes = [scene, *draw_variants(scene, 3, rng)]
        pictures = np.stack([render(s, self.size) for s in scenes])
        return (
            torch.from_numpy(pictures).permute(0, 3, 1, 2),
            [caption(s) for s in scenes],
            torch.tensor([labels(s) for s in scenes]),
            torch.from_numpy(np.stack([shape_map(s, 8) for s in scenes])),
        )


def stream(dataset: Dataset, batch: int, workers: int = 0) -> Iterator[list]:
    """Iterate over a dataset's batches in order; `workers` processes draw ahead (use them for a
    GPU; on a CPU they only take cores from the training)."""
    return iter(DataLoader(dataset, batch, num_workers=workers, pin_memory=workers > 0))


def to_unit(pictures: torch.Tensor, device: torch.device) -> torch.Tensor:
    """uint8 pictures [B, 3, H, W] → float32 in -1..1 on the device, channels last."""
    pictures = pictures.to(device, non_blocking=True).float().div_(127.5).sub_(1)
    return pictures.contiguous(memory_format=torch.channels_last)
