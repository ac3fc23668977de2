"""Compute the features of an image set, or take them from the cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ...errors import EvaluationError
from ..image_sets import ImageEntry
from ..reading import ReadOptions, decode_image, open_image
from .extractors import Extractor
from .storage import FeatureCache, Floats, cache_folder


class Features(NamedTuple):
    """Features of an image set, and what was skipped."""

    values: Floats  # [N, D]
    images: list[ImageEntry]  # the N images
    skipped: list[str]
    """Name and problem of each skipped image."""
    computed: int
    """How many were not in the cache."""


def extract(
    images: list[ImageEntry],
    extractor: Extractor,
    options: ReadOptions | None = None,
    *,
    folder: Path | None = None,
    batch_size: int = 32,
    progress: Callable[[int], object] = lambda done: None,
) -> Features:
    """Features of images, cached batch by batch, so that an interrupted call can be resumed.

    Args:
        images: The images.
        extractor: The network.
        options: How to read the images.
        folder: Folder of the cache; by default :func:`cache_folder`.
        batch_size: Images per batch; more is faster on a GPU and takes more memory.
        progress: Called with the number of images done.

    Raises:
        EvaluationError: If an image cannot be used and such images are not skipped (names the
            first), or if no image is left.
    """
    cache = FeatureCache((folder or cache_folder()) / extractor.identity)
    work = _Extraction(images, extractor, options or ReadOptions(), cache)
    for index in range(len(images)):
        work.add(index)
        if len(work.waiting) == batch_size:
            work.compute()
        if not work.waiting:
            progress(work.done)
    if work.waiting:
        work.compute()
        progress(work.done)
    return work.result()


class _Extraction:
    """The state of one call of :func:`extract`."""

    def __init__(
        self,
        images: list[ImageEntry],
        extractor: Extractor,
        options: ReadOptions,
        cache: FeatureCache,
    ):
        self.images, self.extractor, self.options, self.cache = images, extractor, options, cache
        self.values: dict[int, Floats] = {}
        self.skipped: list[str] = []
        self.waiting: list[tuple[int, str, Image.Image]] = []
        self.size: tuple[int, int] | None = None
        self.computed = 0

    @property
    def done(self) -> int:
        return len(self.values) + len(self.skipped)

    def add(self, index: int) -> None:
        """Take the features of an image from the cache, or read it for the next batch."""
        entry = self.images[index]
        try:
            data, digest = entry.read_verified()
            image = open_image(entry.name, data, self.options)
            self._check_size(entry.name, image)
            key = digest + self.options.cache_suffix
            row = self.cache.get(key)
            if row is None:
                image = decode_image(entry.name, image, self.options)
                self.waiting.append((index, key, image))
            else:
                self.values[index] = row
        except EvaluationError as error:
            self._skip(str(error))

    def compute(self) -> None:
        """Compute and cache the features of the waiting images."""
        indices, keys, images = zip(*self.waiting, strict=True)
        features = self.extractor([*images])
        finite = [bool(np.isfinite(row).all()) for row in features]
        if any(finite):
            kept = [key for key, ok in zip(keys, finite, strict=True) if ok]
            self.cache.put(kept, features[finite])
        for index, row, ok in zip(indices, features, finite, strict=True):
            if ok:
                self.values[index] = row
            else:
                self._skip(f"{self.images[index].name}: its features contain NaN or infinity")
        self.computed += len(self.waiting)
        self.waiting.clear()

    def _check_size(self, name: str, image: Image.Image) -> None:
        self.size = self.size or image.size
        if self.options.size is None and image.size != self.size:
            raise EvaluationError(
                f"{name}: is {image.width}×{image.height}, but earlier images are "
                f"{self.size[0]}×{self.size[1]}; --size N makes all of them N×N"
            )

    def _skip(self, problem: str) -> None:
        if not self.options.skip_bad:
            raise EvaluationError(f"{problem} (--skip-bad skips such images)")
        self.skipped.append(problem)

    def result(self) -> Features:
        if not self.values:
            raise EvaluationError(
                f"none of {len(self.images)} images can be used; the first: {self.skipped[0]}"
            )
        order = sorted(self.values)
        return Features(
            np.stack([self.values[i] for i in order]),
            [self.images[i] for i in order],
            self.skipped,
            self.computed,
        )
