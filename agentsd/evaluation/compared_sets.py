"""Two image sets to compare, and their features: every network sees each image once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import EvaluationError
from ..models.loading import target_device
from .features import Clip, Extractor, Features, extract, load_clip, load_extractor
from .features.storage import Floats, load_statistics
from .image_sets import HIDDEN, ImageEntry, read_image_set, visible, with_prompts
from .metrics import FeatureStatistics
from .reading import ReadOptions

DEFAULT_CLIP = "clip:openai/clip-vit-base-patch16"
"""Default CLIP for images of models other than the pocket model."""

ProgressDisplay = Callable[[str, int], AbstractContextManager[Callable[[int], object]]]
"""Opens a display, given what is counted and the total; the display takes how many are done."""


class ComparedSets:
    """An image set and an optional reference; features are extracted when first needed.

    Args:
        images: Folder, run, or webdataset tar.
        reference: Likewise, or statistics in pytorch-fid's format (.npz); ``None`` if there is
            none.
        features: Extractor for FID, KID, precision and recall; by default ``pocket`` for images of
            the pocket model, else ``inception``.
        clip: CLIP for the CLIP score and the similarity of pairs; by default ``pocket`` likewise,
            else :data:`DEFAULT_CLIP`.
        prompts: A file of prompts, one per line, for images that have none.
        reading: How to read images.
        unfinished: Whether to accept an unfinished run, with its existing images.
        cache: Folder of the feature cache.
        device: Where to run the networks.
        note: Called with notes on the results.
        progress: Displays progress.

    Raises:
        EvaluationError: If the images or the reference cannot be found or read.
        LoadError: If the device is not available.
    """

    def __init__(
        self,
        images: str,
        reference: str | None = None,
        *,
        features: str | None = None,
        clip: str | None = None,
        prompts: Path | None = None,
        reading: ReadOptions,
        unfinished: bool = False,
        cache: Path | None = None,
        device: str | None = None,
        note: Callable[[str], object],
        progress: ProgressDisplay,
    ):
        self.sources = {"images": images, "reference": reference}
        self.images = read_image_set(images, unfinished=unfinished)
        if prompts is not None:
            self.images = with_prompts(self.images, prompts)
        self.reference: list[ImageEntry] | None = None
        self.statistics: FeatureStatistics | None = None
        if reference is not None and reference.endswith(".npz"):
            self.statistics = load_statistics(reference)
        elif reference is not None:
            self.reference = read_image_set(reference, unfinished=unfinished)
        self.device = target_device(device)
        self.reading, self.cache, self.progress = reading, cache, progress
        self.hidden_pairs = 0
        self._asked = {"features": features, "clip": clip}
        self._used: dict[str, str] = {}
        self._notes, self._print_note = set[str](), note
        self._extractors: dict[str, Extractor] = {}
        self._extracted: dict[tuple[str, str], Features] = {}
        self._bad: dict[str, None] = {}  # in order, each once

    @property
    def reference_images(self) -> list[ImageEntry]:
        """The images to compare with.

        Raises:
            EvaluationError: If there are none.
        """
        if self.statistics is not None:
            raise EvaluationError(
                f"{self.sources['reference']}: statistics can only be used for FID; give the images"
            )
        if self.reference is None:
            raise EvaluationError(
                f"{self.sources['images']}: only the CLIP score needs no reference; give REFERENCE"
            )
        return self.reference

    @property
    def image_features(self) -> Floats:
        """Features of the images ``[N, D]``."""
        return self._extract("images", self._feature_name).values

    @property
    def both_features(self) -> tuple[Floats, Floats]:
        """Features of the images ``[N, D]`` and of the reference ``[M, D]``."""
        _ = self.reference_images  # before any work
        return self.image_features, self._extract("reference", self._feature_name).values

    @cached_property
    def clip(self) -> Clip:
        """The CLIP that embeds images and prompts."""
        default = "pocket" if _is_pocket(self.images) else DEFAULT_CLIP
        name = self._used["clip"] = self._asked["clip"] or default
        if not isinstance(self._extractors.get(name), Clip):
            self._extractors[name] = load_clip(name, self.device)
        clip = self._extractors[name]
        assert isinstance(clip, Clip)
        return clip

    def clip_features(self) -> tuple[Clip, Features]:
        """The CLIP, and its features of the images."""
        return self.clip, self._extract("images", self._used["clip"])

    def leave_out(self, problems: Iterable[str]) -> None:
        """Report images that cannot be used."""
        self._bad |= dict.fromkeys(problems)

    def note(self, text: str | None) -> None:
        """Print a note, once."""
        if text is not None and text not in self._notes:
            self._notes.add(text)
            self._print_note(text)

    def note_left_out(self) -> None:
        """Note each image that could not be used, and how many a safety checker hid."""
        for problem in self._bad:
            self.note(f"left out: {problem}")
        if self._hidden:
            self.note(f"left out: {self._hidden} {HIDDEN}")

    def context(self) -> dict[str, Any]:
        """How the sets were measured, and what was left out, for JSON."""
        images = [len(features.images) for features in self._extracted.values()]
        used = self._used if "features" in self._used else {"features": self._used["clip"]}
        return {
            **({"images": images[0]} if images else {}),
            **used,
            "reading": asdict(self.reading),
            "bad": list(self._bad),
            "hidden": self._hidden,
        }

    @property
    def _hidden(self) -> int:
        read = {which for which, _ in self._extracted}
        return sum(p.hidden for which in read for p in self._set(which)) or self.hidden_pairs

    @cached_property
    def _feature_name(self) -> str:
        default = "pocket" if _is_pocket(self.images) else "inception"
        name = self._used["features"] = self._asked["features"] or default
        return name

    def _set(self, which: str) -> list[ImageEntry]:
        return self.images if which == "images" else self.reference_images

    def _extract(self, which: str, name: str) -> Features:
        if (which, name) not in self._extracted:
            shown = visible(self._set(which))
            if name not in self._extractors:
                self._extractors[name] = load_extractor(name, self.device)
            with self.progress("images", len(shown)) as show:
                features = extract(
                    shown, self._extractors[name], self.reading, folder=self.cache, progress=show
                )
            self._extracted[which, name] = features
            self.leave_out(features.skipped)
        return self._extracted[which, name]


def _is_pocket(images: list[ImageEntry]) -> bool:
    return all(image.model == "pocket" for image in images)
