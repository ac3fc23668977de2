"""A race of both images, from the latents of each step and the time when it was finished."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from math import ceil
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

Floats = NDArray[np.float64]

SIDE = 256
"""Maximum pixels of the longer side of a frame."""

COLUMNS = 8
"""Frames in a row of a sheet."""

QUALITY = 70
"""Of the file of a sheet, as WebP."""

RIDGE = 1e-3
"""Regularisation of the least squares, so that flat images have a solution."""


@dataclass
class Trace:
    """The steps of an image as they were made."""

    seconds: list[float] = field(default_factory=list)
    """From the start to the end of each step."""
    latents: list[Floats] = field(default_factory=list)
    """After each step, ``[C, h, w]``."""

    def add(self, seconds: float, latents: torch.Tensor) -> None:
        """Record a step; ``latents`` is ``[1, C, h, w]``."""
        self.seconds.append(seconds)
        self.latents.append(latents[0].float().cpu().numpy().astype(np.float64))


class Lane(NamedTuple):
    """One runner: its frames, and when each of them is reached."""

    label: str
    seconds: list[float]
    """Of each frame; the last is the finished image."""
    frames: list[Image.Image]

    @property
    def total(self) -> float:
        """Seconds of the whole image."""
        return self.seconds[-1]


def lanes(entries: Sequence[tuple[str, Trace, Image.Image, float]]) -> list[Lane]:
    """The lanes of a race.

    Args:
        entries: Of each image its label, its steps, the finished image and the seconds that it
            took. The latents become pictures by the linear map that turns the last latents of the
            first entry into its image, which costs nothing beside a decoder.

    Returns:
        One lane per entry, in the same order.
    """
    _, trace, image, _ = entries[0]
    size = frame_size(image)
    usable = trace.latents and trace.latents[0].ndim == 3
    linear = LinearDecoder.fit(trace.latents[-1], image.resize(size)) if usable else None
    found = []
    for label, trace, image, seconds in entries:
        steps = trace.latents[:-1] if linear else []  # the last one is the image itself
        frames = [linear.decode(latents).resize(size) for latents in steps] if linear else []
        times = [*trace.seconds[: len(frames)], seconds]
        found.append(Lane(label, times, [*frames, image.resize(size, Image.Resampling.LANCZOS)]))
    return found


def frame_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of the frames of an image."""
    scale = min(1.0, SIDE / max(image.size))
    return max(1, round(image.width * scale)), max(1, round(image.height * scale))


@dataclass(frozen=True)
class LinearDecoder:
    """A linear map from each 3 × 3 neighbourhood of latents to a block of pixels."""

    weights: Floats
    """``[9 C + 1, block² · 3]``."""
    block: int

    @classmethod
    def fit(cls, latents: Floats, image: Image.Image) -> LinearDecoder:
        """The map that best predicts an image from latents ``[C, h, w]``."""
        _, h, w = latents.shape
        block = max(1, image.width // w)
        pixels = np.asarray(image.convert("RGB").resize((w * block, h * block)), np.float64)
        blocks = pixels.reshape(h, block, w, block, 3).transpose(0, 2, 1, 3, 4).reshape(h * w, -1)
        x = _neighbourhoods(latents)
        gram = x.T @ x + RIDGE * len(x) * np.eye(x.shape[1])
        return cls(np.linalg.solve(gram, x.T @ blocks).astype(np.float64), block)

    def decode(self, latents: Floats) -> Image.Image:
        """The picture of latents ``[C, h, w]``."""
        _, h, w = latents.shape
        n = self.block
        blocks = np.nan_to_num(_neighbourhoods(latents) @ self.weights)
        pixels = blocks.reshape(h, w, n, n, 3).transpose(0, 2, 1, 3, 4).reshape(h * n, w * n, 3)
        return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))


def _neighbourhoods(latents: Floats) -> Floats:
    """``[C, h, w]`` to ``[h · w, 9 C + 1]``: each position with its neighbours, and a one."""
    _, h, w = latents.shape
    padded = np.pad(latents, ((0, 0), (1, 1), (1, 1)), mode="edge")
    shifted = [padded[:, y : y + h, x : x + w] for y in range(3) for x in range(3)]
    x: Floats = np.concatenate([*shifted, np.ones((1, h, w))]).reshape(-1, h * w).T
    return x


def sheet(lane: Lane) -> Image.Image:
    """All frames of a lane in rows of :data:`COLUMNS`, as a page animates them."""
    width, height = lane.frames[0].size
    rows = ceil(len(lane.frames) / COLUMNS)
    canvas = Image.new("RGB", (width * min(COLUMNS, len(lane.frames)), height * rows))
    for number, frame in enumerate(lane.frames):
        canvas.paste(frame, (number % COLUMNS * width, number // COLUMNS * height))
    return canvas


def sheet_file(lane: Lane) -> bytes:
    """The sheet of a lane as a WebP file."""
    data = BytesIO()
    sheet(lane).save(data, format="WEBP", quality=QUALITY)
    return data.getvalue()
