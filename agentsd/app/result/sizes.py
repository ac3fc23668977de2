"""The sizes that the page offers for a model, and what each is expected to take."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from ..jobs.time_estimator import PlannedImage, TimeEstimator


class SizeEstimate(NamedTuple):
    """What an image size is expected to cost."""

    height: int
    width: int
    unpatched: float | None
    """Seconds, or ``None`` before any image was measured."""
    patched: float | None
    speedup: float | None


def size_estimates(
    estimator: TimeEstimator, image: PlannedImage, sizes: Iterable[tuple[int, int]]
) -> list[SizeEstimate]:
    """Estimates of a patched image at several sizes, as ``(height, width)``."""
    found = []
    for height, width in sizes:
        settings = image.settings.model_copy(update={"height": height, "width": width})
        ours = image._replace(settings=settings)
        unpatched = estimator.seconds([ours._replace(schedule=None)])
        patched, ratio = estimator.seconds([ours]), estimator.speedup(ours)
        found.append(SizeEstimate(height, width, unpatched, patched, ratio))
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
