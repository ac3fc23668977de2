"""Run comparisons for the page and the API, and keep their images and figures as files."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import AgentSDError
from ..generation.image_files import read_record, write_whole
from ..generation.images import HIDDEN
from ..generation.prompt_encoding import warnings_for
from ..generation.records import ImageRecord
from .catalog import ImageRequest
from .compare import ClipScorer, Compared, compare, planned, pocket_clip_scorer
from .history import Entry, new_folder, save
from .job import Job
from .schedule_text import name_of
from .worker import Worker

SUMMARY = "comparison.json"
"""File beside a comparison's images, with its figures."""


class SavedComparison(NamedTuple):
    """A comparison whose images are files."""

    key: str
    """Name of its folder, which nobody can guess."""
    request: ImageRequest
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
        self.worker, self._folder = worker, folder
        self._scorers: dict[str, ClipScorer] = {}
        if "pocket" in worker.pipes:
            self._scorers["pocket"] = pocket_clip_scorer()

    def follow(
        self, request: ImageRequest, owner: Hashable = None
    ) -> AbstractAsyncContextManager[Any]:
        """As :meth:`Worker.follow`; the result is a :class:`SavedComparison`."""
        images = planned(self.worker.pipes[request.model], request)
        return self.worker.follow(lambda job: self._make(job, request), images, owner)

    def load(self, key: Any) -> SavedComparison | None:
        """A comparison made before; ``None`` if its files are gone."""
        if not isinstance(key, str) or not re.fullmatch("[0-9a-f]{32}", key):
            return None
        folder = Path(self._folder) / key
        try:
            data = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
            unpatched, patched = (
                Entry(str(folder / name), caption, read_record(folder / name))
                for caption, name in data["files"].items()
            )
        except (OSError, AgentSDError):
            return None
        request = _request(patched.record, data["scheduler"])
        return SavedComparison(key, request, unpatched, patched, data["figures"], data["notes"])

    def _make(self, job: Job, request: ImageRequest) -> SavedComparison:
        pipe = self.worker.pipes[request.model]
        made = compare(job, pipe, request, self._scorers.get(request.model))
        folder = new_folder(self._folder)
        seed, captions = request.settings.seed, ("unpatched", name_of(request.schedule))
        images = made.unpatched.image, made.ours.image
        unpatched, patched = (
            save(folder / f"agentsd-{seed}-{caption}.png", image, record, caption)
            for image, record, caption in zip(images, made.records, captions, strict=True)
        )
        notes = _hidden(made) + warnings_for(pipe, request.settings)
        summary = {
            "files": {entry.caption: Path(entry.file).name for entry in (unpatched, patched)},
            "scheduler": request.scheduler,
            "figures": made.figures,
            "notes": notes,
        }
        write_whole(folder / SUMMARY, json.dumps(summary).encode())
        return SavedComparison(folder.name, request, unpatched, patched, made.figures, notes)


def _request(record: ImageRecord, scheduler: str | None) -> ImageRequest:
    """The request of a patched image."""
    assert record.schedule is not None
    return ImageRequest(
        model=record.model,
        settings=record.settings,
        schedule=record.schedule,
        scheduler=scheduler,
    )


def _hidden(made: Compared) -> list[str]:
    images = {"unpatched": made.unpatched, "patched": made.ours}
    return [
        f"{name} image: {HIDDEN}" for name, image in images.items() if image.nsfw_content_detected
    ]
