"""Run comparisons for the page and the API, and save their images."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from io import BytesIO
from typing import Any, NamedTuple

from ..generation.images import HIDDEN
from ..generation.prompt_encoding import warnings_for
from . import race
from .catalog import ImageRequest
from .compare import ClipScorer, Compared, compare, pocket_clip_scorer
from .difference_views import Pair, Runner
from .estimates import Estimates
from .history import Entry, save, write_file
from .worker import Job, Stopped, Worker

SHEET_QUALITY = 70
"""Of the frames of a race, as WebP."""


class SavedComparison(NamedTuple):
    """A comparison whose images are files."""

    unpatched: Entry
    patched: Entry
    figures: dict[str, Any]
    notes: list[str]
    """What a visitor should know: which images are hidden, which part of a prompt is not used."""
    pair: Pair
    """The images as the page shows them."""


class Comparisons:
    """Makes comparisons when their turn comes.

    Args:
        worker: Runs the jobs.
        folder: Where images are written.
        estimates: Of each model, which learn from the comparisons.
    """

    def __init__(self, worker: Worker, folder: str, estimates: dict[str, Estimates]) -> None:
        self._worker, self._folder, self._estimates = worker, folder, estimates
        self._scorers: dict[str, ClipScorer] = {}
        if "pocket" in worker.pipes:
            self._scorers["pocket"] = pocket_clip_scorer()

    @property
    def busy(self) -> bool:
        """Whether another job comes first."""
        return self._worker.waiting > 0

    def follow(
        self, request: ImageRequest, schedule_name: str = "patched"
    ) -> AbstractAsyncContextManager[Any]:
        """As :meth:`Worker.follow`; the result is a :class:`SavedComparison` for each seed.

        Args:
            request: For one seed or more.
            schedule_name: Shown with the patched images.
        """
        return self._worker.follow(
            lambda job: self._make_all(job, request, schedule_name), images=2 * request.images
        )

    def _make_all(
        self, job: Job, request: ImageRequest, schedule_name: str
    ) -> list[SavedComparison]:
        """Make the seeds in turn; a stop keeps those that are finished."""
        done: list[SavedComparison] = []
        for number, one in enumerate(request.seeds()):
            try:
                done.append(self._make(job, one, number, schedule_name))
            except Stopped:
                if not done:
                    raise
                break
        return done

    def _make(
        self, job: Job, request: ImageRequest, number: int, schedule_name: str
    ) -> SavedComparison:
        pipe = self._worker.pipes[request.model]
        made = compare(job, pipe, request, self._scorers.get(request.model), number)
        self._learn(request, made)
        images = made.unpatched.image, made.ours.image
        unpatched, patched = (
            save(self._folder, image, record, caption)
            for image, record, caption in zip(
                images, made.records, ("unpatched", "patched"), strict=True
            )
        )
        notes = _hidden(made) + warnings_for(pipe, request.settings)
        pair = self._pair(request, made, (unpatched.file, patched.file), schedule_name)
        return SavedComparison(unpatched, patched, made.figures, notes, pair)

    def _learn(self, request: ImageRequest, made: Compared) -> None:
        share = 1.0 if request.options.init_image is None else request.options.strength
        times = ((None, made.unpatched), (request.schedule, made.ours))
        for schedule, image in times:
            self._estimates[request.model].add(request.settings, schedule, image.seconds, share)

    def _pair(
        self, request: ImageRequest, made: Compared, files: tuple[str, str], schedule_name: str
    ) -> Pair:
        labels = "Original", f"agentsd ({schedule_name})"
        entries = [
            (label, trace, image.image, image.seconds)
            for label, trace, image in zip(
                labels, made.traces, (made.unpatched, made.ours), strict=True
            )
        ]
        runners = []
        for lane, file in zip(race.lanes(entries), files, strict=True):
            data = BytesIO()
            race.sheet(lane).save(data, format="WEBP", quality=SHEET_QUALITY)
            frames = write_file(self._folder, "frames.webp", data.getvalue())
            runners.append(Runner(lane.label, file, lane.total, frames, lane.seconds))
        original, patched = runners
        size = made.ours.image.size
        return Pair(request.settings.seed, original, patched, size, race.COLUMNS)


def _hidden(made: Compared) -> list[str]:
    images = {"unpatched": made.unpatched, "patched": made.ours}
    return [
        f"{name} image: {HIDDEN}" for name, image in images.items() if image.nsfw_content_detected
    ]
