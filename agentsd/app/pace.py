"""How long a denoising step takes here, learned from the images made, so that waits can be told."""

from __future__ import annotations

from collections import OrderedDict
from math import log
from typing import NamedTuple

from diffusers import DiffusionPipeline

from ..image_settings import ImageSettings
from ..schedule import Schedule

MAX_ENTRIES = 256
"""Kinds of images whose pace is kept; those longest unused go first."""


class PlannedImage(NamedTuple):
    """An image that a job will make.

    Args:
        pipe: The pipeline.
        settings: Of the image, including its size.
        schedule: ``None`` for the unpatched image.
        scheduler: Name of a scheduler; ``None`` for the model's own.
    """

    pipe: DiffusionPipeline
    settings: ImageSettings
    schedule: Schedule | None
    scheduler: str | None = None

    @property
    def pixels(self) -> int:
        """Width times height."""
        return (self.settings.height or 0) * (self.settings.width or 0)


class _Kind(NamedTuple):
    """What the time of a step depends on."""

    pipe: int
    pixels: int
    guided: bool
    schedule: Schedule | None
    scheduler: str | None

    @classmethod
    def of(cls, image: PlannedImage) -> _Kind:
        guided = image.settings.guidance_scale > 1
        return cls(id(image.pipe), image.pixels, guided, image.schedule, image.scheduler)


class Pace:
    """Seconds a step of the kinds of images that have been made."""

    def __init__(self) -> None:
        self._seconds: OrderedDict[_Kind, float] = OrderedDict()

    def learn(self, image: PlannedImage, seconds: float) -> None:
        """Note the seconds that a step of an image took."""
        kind = _Kind.of(image)
        self._seconds[kind] = seconds
        self._seconds.move_to_end(kind)
        if len(self._seconds) > MAX_ENTRIES:
            self._seconds.popitem(last=False)

    def is_warm(self, image: PlannedImage) -> bool:
        """Whether an image of this size has been made before, as patched or unpatched as this."""
        size = id(image.pipe), image.pixels
        return any(
            (kind.pipe, kind.pixels) == size and (kind.schedule is None) is (image.schedule is None)
            for kind in list(self._seconds)
        )

    def estimate(self, image: PlannedImage) -> float | None:
        """Seconds that an image will take; ``None`` before its model has made any.

        An image of a new kind is expected to be as fast, per pixel, as the most similar kind.
        """
        kind = _Kind.of(image)
        known = [(k, s) for k, s in list(self._seconds.items()) if k.pipe == kind.pipe]
        if not known:
            return None

        def distance(entry: tuple[_Kind, float]) -> tuple[float, ...]:
            other = entry[0]
            return (
                abs(log(other.pixels / kind.pixels)),
                other.schedule != kind.schedule,
                (other.schedule is None) != (kind.schedule is None),
                other.scheduler != kind.scheduler,
                other.guided != kind.guided,
            )

        nearest, seconds = min(known, key=distance)
        return seconds * kind.pixels / nearest.pixels * image.settings.num_inference_steps
