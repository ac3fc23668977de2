"""Run comparisons for the page and the API, and save their images."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Any, NamedTuple

from ..generation.images import HIDDEN
from ..generation.prompt_encoding import warnings_for
from .catalog import ImageRequest
from .compare import ClipScorer, Compared, compare, pocket_clip_scorer
from .history import Entry, save
from .worker import Job, Worker


class SavedComparison(NamedTuple):
    """A comparison whose images are files."""

    unpatched: Entry
    patched: Entry
    figures: dict[str, Any]
    notes: list[str]
    """What a visitor should know: which images are hidden, which part of a prompt is not used."""


class Comparisons:
    """Makes comparisons when their turn comes.

    Args:
        worker: Runs the jobs.
        folder: Where images are written.
    """

    def __init__(self, worker: Worker, folder: str) -> None:
        self._worker, self._folder = worker, folder
        self._scorers: dict[str, ClipScorer] = {}
        if "pocket" in worker.pipes:
            self._scorers["pocket"] = pocket_clip_scorer()

    @property
    def busy(self) -> bool:
        """Whether another job comes first."""
        return self._worker.waiting > 0

    def follow(self, request: ImageRequest) -> AbstractAsyncContextManager[Any]:
        """As :meth:`Worker.follow`; the result is a :class:`SavedComparison`."""
        return self._worker.follow(lambda job: self._make(job, request), images=2)

    def _make(self, job: Job, request: ImageRequest) -> SavedComparison:
        pipe = self._worker.pipes[request.model]
        made = compare(job, pipe, request, self._scorers.get(request.model))
        images = made.unpatched.image, made.ours.image
        unpatched, patched = (
            save(self._folder, image, record, caption)
            for image, record, caption in zip(
                images, made.records, ("unpatched", "patched"), strict=True
            )
        )
        notes = _hidden(made) + warnings_for(pipe, request.settings)
        return SavedComparison(unpatched, patched, made.figures, notes)


def _hidden(made: Compared) -> list[str]:
    images = {"unpatched": made.unpatched, "patched": made.ours}
    return [
        f"{name} image: {HIDDEN}" for name, image in images.items() if image.nsfw_content_detected
    ]
