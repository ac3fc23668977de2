"""Endless training data in which sample i is a pure function of (seed, i)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from .scenes import (
    Placed,
    caption,
    close_up,
    draw,
    labels,
    place,
    render,
    sample_scene,
    shape_map,
)
from .settings import Settings
from .tokenizer import CLOSE_UP
from .variants import draw_variants

KINDS = ("close-up", "whole")
CELL = 16  # pixels per cell of the shape map


View = tuple[tuple[float, float, float], list[Placed], str]
"""Background, shapes and caption of a picture."""


class ScenePictures(Dataset):
    """Pictures and captions by number: the same number always gives the same sample.

    Args:
        seed: of the stream; training and evaluation use different ones.
        size: side of the pictures in pixels.
        first: number of the first sample, so that a resumed run continues where it stopped.
    """

    def __init__(self, seed: int, size: int, first: int = 0):
        self.seed, self.size, self.first = seed, size, first

    def __len__(self) -> int:
        return 2**40

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        """Return a uint8 picture [3, size, size] and its caption."""
        return self.with_map(index)[:2]

    def with_map(self, index: int) -> tuple[torch.Tensor, str, torch.Tensor]:
        """The same, and the shape map [size / CELL, size / CELL], see `shape_map`."""
        background, shapes, text = self.view(np.random.default_rng((self.seed, self.first + index)))
        picture = torch.from_numpy(draw(background, shapes, self.size)).permute(2, 0, 1)
        return picture, text, torch.from_numpy(shape_map(shapes, self.size // CELL))

    def view(self, rng: np.random.Generator) -> View:
        """Draw a sample."""
        scene = sample_scene(rng)
        return *place(scene), caption(scene)


class CloseUps(ScenePictures):
    """Crops of half a picture's side at the same scale, most of them with a shape."""

    def view(self, rng: np.random.Generator) -> View:
        """Draw a sample."""
        scene = sample_scene(rng)
        background, shapes = place(scene)
        near = shapes[int(rng.integers(len(shapes)))]
        edges = np.array([near.x, near.y]) - 0.25 + rng.uniform(-0.2, 0.2, 2)
        left, top = np.clip(edges, 0, 0.5).tolist()
        return background, close_up(shapes, left, top, 0.5), f"{CLOSE_UP} {caption(scene)}"


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
            torch.from_numpy(np.stack([shape_map(place(s)[1], 8) for s in scenes])),
        )


class Batches(Dataset):
    """The samples of each shard of each step, derived from numbers: checkpoints need no data state.

    Args:
        settings: of the run.
        counts: samples of each kind.
        first: number of the first sample, counted over kinds.
    """

    def __init__(self, settings: Settings, counts: dict[str, int], first: int):
        seed = settings.seed
        sides = (32, 64) if settings.smoke else (128, 256)
        streams = (CloseUps(seed, sides[0]), ScenePictures(seed, sides[1]))
        self.streams = dict(zip(KINDS, streams, strict=True))
        self.counts, self.first = counts, first

    def __len__(self) -> int:
        return 2**40

    def __getitem__(self, index: int) -> list[tuple[str, torch.Tensor, list[str], torch.Tensor]]:
        """Return for each kind its name, pictures uint8 [B, 3, H, W], captions and maps of the
        shapes [B, H / CELL, W / CELL]."""
        first, found = self.first + index * sum(self.counts.values()), []
        for kind, count in self.counts.items():
            if count:
                some = (self.streams[kind].with_map(first + i) for i in range(count))
                pictures, texts, maps = zip(*some, strict=True)
                found.append((kind, torch.stack(pictures), list(texts), torch.stack(maps)))
            first += count
        return found


def stream(dataset: Dataset, batch: int, workers: int = 0) -> Iterator[list]:
    """Iterate over a dataset's batches in order; `workers` processes prefetch (use them with a GPU;
    on a CPU they only take cores away from training)."""
    return iter(DataLoader(dataset, batch, num_workers=workers, pin_memory=workers > 0))


def to_unit(pictures: torch.Tensor, device: torch.device) -> torch.Tensor:
    """uint8 pictures [B, 3, H, W] → float32 in -1..1 on the device, channels last."""
    pictures = pictures.to(device, non_blocking=True).float().div_(127.5).sub_(1)
    return pictures.contiguous(memory_format=torch.channels_last)
