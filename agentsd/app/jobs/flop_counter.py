"""How many operations an image takes, counted on the architecture alone."""

from __future__ import annotations

from functools import lru_cache
from threading import Lock

import torch
from diffusers import DiffusionPipeline

from ...image_settings import ImageSettings
from ...models.architectures import Architecture
from ...models.schedulers import unet_calls
from ...patching.flops import Flops, run_flops, unpatched_flops
from ...patching.forecasts import planned_calls
from ...patching.layers import find_unet
from ...patching.patch import patch_of, patched
from ...schedule import Schedule

MAX_COUNTS = 256
"""Counts kept of a model; the oldest go first."""

Run = tuple[Schedule | None, tuple[int, int], int]
"""A schedule, the size of the latents and the number of steps."""


class FlopCounter:
    """Counts the operations of one model's images.

    Args:
        pipe: The model with its own scheduler; no weights are kept.
    """

    def __init__(self, pipe: DiffusionPipeline) -> None:
        unet = find_unet(pipe)
        with torch.device("meta"):
            twin = type(unet).from_config(unet.config)
        self._architecture = Architecture(twin, pipe.vae_scale_factor)
        self._device = pipe.device.type
        self._lock = Lock()
        self._counts: dict[Run, Flops | None] = {}
        own = pipe.scheduler
        self._calls = lru_cache(MAX_COUNTS)(lambda name, steps: unet_calls(own, name, steps))

    def count(
        self, settings: ImageSettings, schedule: Schedule | None, scheduler: str | None = None
    ) -> Flops | None:
        """The operations of an image; half without guidance, which doubles the batch.

        Args:
            settings: Of the image, including its size.
            schedule: ``None`` for the unpatched image.
            scheduler: Name of a scheduler; ``None`` for the model's own.

        Returns:
            ``None`` for a model or a size whose operations cannot be counted.
        """
        factor, steps = self._architecture.vae_scale_factor, settings.num_inference_steps
        size = (settings.height or 0) // factor, (settings.width or 0) // factor
        found = self._count(schedule, size, 1 if schedule is None else steps)
        if found is None:
            return None
        runs = self._calls(scheduler, steps) / (1 if schedule is None else steps)
        return found.times(runs * (1 if settings.guidance_scale > 1 else 0.5))

    def _count(self, schedule: Schedule | None, size: tuple[int, int], steps: int) -> Flops | None:
        run = schedule, size, steps
        try:
            return self._counts[run]  # without the lock: another count may take a second
        except KeyError:
            with self._lock:
                if run not in self._counts:
                    if len(self._counts) >= MAX_COUNTS:
                        del self._counts[next(iter(self._counts))]
                    self._counts[run] = self._count_anew(*run)
                return self._counts[run]

    def _count_anew(
        self, schedule: Schedule | None, size: tuple[int, int], steps: int
    ) -> Flops | None:
        unet = self._architecture.unet
        if schedule is None:
            one = unpatched_flops(unet, size)
            return None if one is None else one.times(steps)
        with patched(self._architecture, schedule):
            patch = patch_of(unet)
            assert patch is not None
            calls = planned_calls(schedule, steps)
            return run_flops(unet, patch.runtime, size, self._device, calls)
