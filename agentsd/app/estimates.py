"""How long an image will take: operations, at the rates that finished images were computed at."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import DiffusionPipeline

from ..image_settings import ImageSettings
from ..models.architectures import Architecture
from ..patching.layers import find_unet
from ..patching.patch import patch_of, patched
from ..patching.work import Operations, run_operations
from ..schedule import Schedule

KEPT = 64
"""Finished images that rates are fitted to, of each model."""

Rates = tuple[float, float]
"""Seconds per operation: of attention, and of all else."""


class Estimates:
    """Estimates for one model; they follow the images that this server finished.

    The rates are fitted to measured times. The patched and the unpatched image of one comparison
    differ in their share of attention, so that a single comparison gives both rates.

    Args:
        pipe: The model.
    """

    def __init__(self, pipe: DiffusionPipeline) -> None:
        unet = find_unet(pipe)
        with torch.device("meta"):
            twin = type(unet).from_config(unet.config)
        self._architecture = Architecture(twin, pipe.vae_scale_factor)
        self._device = pipe.device.type
        self._lock = Lock()
        self._measured: list[tuple[Operations, float]] = []
        self._count = lru_cache(maxsize=256)(self._count_operations)

    def add(
        self, settings: ImageSettings, schedule: Schedule | None, seconds: float, share: float = 1
    ) -> None:
        """Learn from a finished image.

        Args:
            settings: Of the image.
            schedule: ``None`` for the unpatched image.
            seconds: That it took.
            share: Of the steps that were run, as in image to image.
        """
        found = self._operations(settings, schedule)
        if found is not None:
            self._measured = [*self._measured, (found.times(share), seconds)][-KEPT:]

    def seconds(self, settings: ImageSettings, schedule: Schedule | None) -> float | None:
        """Seconds that an image will take; ``None`` before any image was measured."""
        found, rates = self._operations(settings, schedule), fit_rates(self._measured)
        if found is None or rates is None:
            return None
        return rates[0] * found.attention + rates[1] * found.other

    def speedup(self, settings: ImageSettings, schedule: Schedule) -> float | None:
        """How many times as fast the patched image will be.

        Before any image was measured it is the ratio of operations.
        """
        seconds = [self.seconds(settings, each) for each in (None, schedule)]
        if seconds[0] and seconds[1]:
            return seconds[0] / seconds[1]
        counts = [self._operations(settings, each) for each in (None, schedule)]
        return counts[0].total / counts[1].total if counts[0] and counts[1] else None

    def _operations(self, settings: ImageSettings, schedule: Schedule | None) -> Operations | None:
        """Operations of an image; half without guidance, which doubles the batch."""
        factor = self._architecture.vae_scale_factor
        size = (settings.height or 0) // factor, (settings.width or 0) // factor
        steps = settings.num_inference_steps
        with self._lock:  # so that requests for the same count wait for it
            found = self._count(schedule, size, 1 if schedule is None else steps)
        if found is None:
            return None
        runs = (steps if schedule is None else 1) * (1 if settings.guidance_scale > 1 else 0.5)
        return found.times(runs)

    def _count_operations(
        self, schedule: Schedule | None, size: tuple[int, int], steps: int
    ) -> Operations | None:
        unet = self._architecture.unet
        if schedule is None:
            return run_operations(unet, None, size, self._device, steps)
        with patched(self._architecture, schedule):
            patch = patch_of(unet)
            runtime = patch.runtime if patch else None
            return run_operations(unet, runtime, size, self._device, steps)


def fit_rates(measured: Iterable[tuple[Operations, float]]) -> Rates | None:
    """Seconds per operation of attention and of all else, by least squares on relative errors.

    Args:
        measured: Operations of finished images, and the seconds that they took.

    Returns:
        The rates, none of them negative; ``None`` without images.

    Example:
        >>> done = [(Operations(1e9, 1e9), 3.0), (Operations(0, 1e9), 2.0)]
        >>> [round(rate * 1e9, 6) for rate in fit_rates(done)]
        [1.0, 2.0]
    """
    rows = [(*count, seconds) for count, seconds in measured if seconds > 0 and count.total > 0]
    if not rows:
        return None
    table = np.array(rows)
    scaled, ones = table[:, :2] / table[:, 2:], np.ones(len(rows))
    if np.linalg.matrix_rank(scaled / scaled.max(), tol=1e-3) == 2:
        attention, other = np.linalg.lstsq(scaled, ones, rcond=None)[0]
        if attention >= 0 and other >= 0:
            return float(attention), float(other)
    total = scaled.sum(axis=1)
    rate = float(total.sum() / (total**2).sum())
    return rate, rate


class SizeEstimate(NamedTuple):
    """What an image size is expected to cost."""

    height: int
    width: int
    unpatched: float | None
    """Seconds, or ``None`` before any image was measured."""
    patched: float | None
    speedup: float | None


def size_estimates(
    estimates: Estimates, settings: ImageSettings, schedule: Schedule, sizes: Iterable[Any]
) -> list[SizeEstimate]:
    """Estimates of the same image at several sizes, as ``(height, width)``."""
    found = []
    for height, width in sizes:
        at_size = settings.model_copy(update={"height": height, "width": width})
        unpatched, ours = (estimates.seconds(at_size, each) for each in (None, schedule))
        ratio = estimates.speedup(at_size, schedule)
        found.append(SizeEstimate(height, width, unpatched, ours, ratio))
    return found


def offered_sizes(height: int, width: int, max_pixels: int) -> list[tuple[int, int]]:
    """Half, one, one and a half and twice a model's own sides, within a limit.

    Example:
        >>> offered_sizes(512, 512, 1024 * 1024)
        [(256, 256), (512, 512), (768, 768), (1024, 1024)]
    """
    sizes = []
    for factor in (0.5, 1, 1.5, 2):
        sides = [max(64, math.floor(side * factor / 64 + 0.5) * 64) for side in (height, width)]
        if sides[0] * sides[1] <= max_pixels and (sides[0], sides[1]) not in sizes:
            sizes.append((sides[0], sides[1]))
    return sizes
