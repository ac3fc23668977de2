"""How long images take here: their operations, at the rates that earlier images were made at."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from threading import Lock
from typing import NamedTuple

import numpy as np
from diffusers import DiffusionPipeline

from ...image_settings import ImageSettings
from ...patching.flops import Flops
from ...schedule import Schedule
from .flop_counter import FlopCounter

KEPT = 64
"""Kinds of images that rates are fitted to, of all models; those longest unused go first."""

Rates = tuple[float, float]
"""Seconds per operation: of attention, and of all else."""


class PlannedImage(NamedTuple):
    """An image that a job will make.

    Args:
        pipe: The pipeline.
        settings: Of the image, including its size.
        schedule: ``None`` for the unpatched image.
        scheduler: Name of a scheduler; ``None`` for the model's own.
        strength: Share of the steps that is run, as in image to image.
    """

    pipe: DiffusionPipeline
    settings: ImageSettings
    schedule: Schedule | None
    scheduler: str | None = None
    strength: float = 1.0


class _Kind(NamedTuple):
    """What the time of an image depends on, besides its number of steps."""

    pipe: int
    size: tuple[int | None, int | None]
    guided: bool
    schedule: Schedule | None
    scheduler: str | None

    @classmethod
    def of(cls, image: PlannedImage) -> _Kind:
        settings = image.settings
        guided, size = settings.guidance_scale > 1, (settings.height, settings.width)
        return cls(id(image.pipe), size, guided, image.schedule, image.scheduler)


class _Seen(NamedTuple):
    """What was measured of a kind of images."""

    operations: Flops
    seconds: float


class TimeEstimator:
    """Estimates of how long images take, which follow the images that were made.

    The patched and the unpatched image of one comparison differ in their share of attention, so
    that a single comparison gives the rates of both, and with them estimates at any size.

    Args:
        pipes: The pipelines that images will be made with.
    """

    def __init__(self, *pipes: DiffusionPipeline) -> None:
        self._counters = {id(pipe): FlopCounter(pipe) for pipe in pipes}
        self._seen: OrderedDict[_Kind, _Seen] = OrderedDict()
        self._rates: dict[int, Rates | None] = {}
        self._lock = Lock()

    def learn(self, image: PlannedImage, seconds: float, share: float = 1.0) -> None:
        """Note that a share of an image, all of it or its first steps, took some seconds."""
        operations = self._operations(image)
        if operations is None or seconds <= 0 or not operations.total:
            return
        kind = _Kind.of(image)
        with self._lock:
            self._seen[kind] = _Seen(operations.times(share), seconds)
            self._seen.move_to_end(kind)
            if len(self._seen) > KEPT:
                self._seen.popitem(last=False)
            of_model = [seen for other, seen in self._seen.items() if other.pipe == kind.pipe]
            self._rates[kind.pipe] = fit_rates(of_model)

    def is_warm(self, image: PlannedImage) -> bool:
        """Whether an image of this size has been made before, as patched or unpatched as this."""
        kind = _Kind.of(image)
        with self._lock:
            return any(
                (seen.pipe, seen.size) == (kind.pipe, kind.size)
                and (seen.schedule is None) is (kind.schedule is None)
                for seen in self._seen
            )

    def prepare(self, images: Iterable[PlannedImage]) -> None:
        """Count the operations of images, which may take a second for each new kind."""
        for image in images:
            self._operations(image)

    def seconds(self, images: Sequence[PlannedImage]) -> float | None:
        """Seconds that images will take; ``None`` before their model has made any.

        A kind of image that was made before takes as long as then, in proportion to its operations.
        """
        found = [self._estimate(image) for image in images]
        known = [seconds for seconds in found if seconds is not None]
        return sum(known) if len(known) == len(found) else None

    def speedup(self, image: PlannedImage) -> float | None:
        """How many times as fast a patched image is as the same without its schedule.

        Before its model has made any image it is the ratio of operations.
        """
        pair = image._replace(schedule=None), image
        seconds = [self._estimate(each) for each in pair]
        if seconds[0] and seconds[1]:
            return seconds[0] / seconds[1]
        counts = [self._operations(each) for each in pair]
        return counts[0].total / counts[1].total if counts[0] and counts[1] else None

    def _estimate(self, image: PlannedImage) -> float | None:
        operations, kind = self._operations(image), _Kind.of(image)
        with self._lock:
            rates, seen = self._rates.get(kind.pipe), self._seen.get(kind)
        if operations is None or rates is None:
            return None
        if seen is not None:
            return seen.seconds * operations.total / seen.operations.total
        return rates[0] * operations.attention + rates[1] * operations.other

    def _operations(self, image: PlannedImage) -> Flops | None:
        counter = self._counters[id(image.pipe)]
        found = counter.count(image.settings, image.schedule, image.scheduler)
        return None if found is None else found.times(image.strength)


def fit_rates(seen: Iterable[tuple[Flops, float]]) -> Rates | None:
    """Seconds per operation of attention and of all else, by least squares on relative errors.

    Args:
        seen: Flops that were done, and the seconds that they took.

    Returns:
        The rates, none of them negative; ``None`` if nothing was done.

    Example:
        >>> done = [(Flops(1e9, 1e9), 3.0), (Flops(0, 1e9), 2.0)]
        >>> [round(rate * 1e9, 6) for rate in fit_rates(done)]
        [1.0, 2.0]
    """
    rows = [(*count, seconds) for count, seconds in seen if seconds > 0 and count.total > 0]
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
