"""Run comparisons for the page and the API, and keep their images and figures as files."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Hashable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import AgentSDError
from ...generation.image_files import encode_image, read_record, write_whole
from ...generation.images import HIDDEN
from ...generation.prompt_encoding import warnings_for
from ...generation.records import ImageRecord
from ..jobs.job import ORIGINAL, OURS, Job, JobStopped
from ..jobs.worker import Worker
from ..requests.catalog import ImageRequest, ModelCatalog
from ..requests.request_options import read_options, restored_options
from ..requests.schedule_library import ScheduleLibrary
from . import race
from .compare import ClipScorer, Compared, compare, planned, pocket_clip_scorer
from .difference_views import Pair, Runner
from .saved_files import SavedImage, new_folder

SUMMARY = "comparison.json"
"""File beside a comparison's images, with its figures."""

START = "start"
"""Name, without its suffix, of the copy of an image that others were started from."""


class SavedComparison(NamedTuple):
    """A comparison whose images are files."""

    key: str
    """Name of its folder, which nobody can guess."""
    request: ImageRequest
    unpatched: SavedImage
    patched: SavedImage
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
        catalog: What visitors can ask for.
        library: Names of schedules.
    """

    def __init__(
        self, worker: Worker, folder: str, catalog: ModelCatalog, library: ScheduleLibrary
    ) -> None:
        self.worker, self._folder = worker, folder
        self._catalog, self._library = catalog, library
        self._scorers: dict[str, ClipScorer] = {}
        if "pocket" in worker.pipes:
            self._scorers["pocket"] = pocket_clip_scorer()

    def follow(
        self, request: ImageRequest, owner: Hashable = None
    ) -> AbstractAsyncContextManager[Any]:
        """As :meth:`Worker.follow`; the result is a :class:`SavedComparison` for each seed."""
        images = planned(self.worker.pipes[request.model], request)
        return self.worker.follow(lambda job: self._make_all(job, request), images, owner)

    def load(self, key: Any) -> SavedComparison | None:
        """A comparison made before; ``None`` if its files are gone."""
        if not isinstance(key, str) or not re.fullmatch("[0-9a-f]{32}", key):
            return None
        folder = Path(self._folder) / key
        try:
            data = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
            unpatched, patched = (
                SavedImage(
                    str(folder / one["file"]), one["label"], read_record(folder / one["file"])
                )
                for one in data["images"]
            )
            request = self._request(patched.record, data["scheduler"], starting_image(folder))
        except (OSError, AgentSDError):
            return None
        original, ours = (
            Runner(entry.caption, entry.file, str(folder / one["frames"]), one["times"])
            for entry, one in zip((unpatched, patched), data["images"], strict=True)
        )
        size = data["width"], data["height"]
        pair = Pair(request.settings.seed, original, ours, size, race.COLUMNS)
        figures, notes = data["figures"], data["notes"]
        return SavedComparison(key, request, unpatched, patched, figures, notes, pair)

    def _request(
        self, record: ImageRecord, scheduler: str | None, init_image: str | None
    ) -> ImageRequest:
        """The request of a patched image."""
        assert record.schedule is not None
        options, _ = restored_options(record.options, self._catalog.loras, init_image)
        return ImageRequest(
            model=record.model,
            settings=record.settings,
            schedule=record.schedule,
            scheduler=scheduler,
            options=read_options(record.settings, self._catalog.loras, **options),
        )

    def _make_all(self, job: Job, request: ImageRequest) -> list[SavedComparison]:
        """Make the seeds in turn; a stop keeps those that are finished."""
        done: list[SavedComparison] = []
        try:
            for number, one in enumerate(request.seeds()):
                done.append(self._make(job, one, number))
        except JobStopped:
            if not done:
                raise
        return done

    def _make(self, job: Job, request: ImageRequest, number: int) -> SavedComparison:
        pipe = self.worker.pipes[request.model]
        made = compare(job, pipe, request, self._scorers.get(request.model), number)
        folder = new_folder(self._folder)
        name = self._library.name_of(request.schedule)
        labels, images = (ORIGINAL, f"{OURS} ({name})"), (made.unpatched, made.ours)
        seconds = [image.seconds for image in images]
        pictures = [image.image for image in images]
        lanes = race.lanes([*zip(labels, made.traces, pictures, seconds, strict=True)])
        saved = []
        for lane, image, record, kind in zip(
            lanes, pictures, made.records, (ORIGINAL.lower(), _plain(name)), strict=True
        ):
            file = folder / f"agentsd-{request.settings.seed}-{kind}.png"
            write_whole(file, encode_image(image, record))
            frames = file.with_suffix(".webp")
            write_whole(frames, race.sheet_file(lane))
            times = [round(seconds, 4) for seconds in lane.seconds]
            saved.append(
                {"label": lane.label, "file": file.name, "frames": frames.name, "times": times}
            )
        if request.options.init_image is not None:
            start = Path(request.options.init_image)
            shutil.copyfile(start, folder / f"{START}{start.suffix}")
        width, height = made.ours.image.size
        summary = {
            "images": saved,
            "width": width,
            "height": height,
            "scheduler": request.scheduler,
            "figures": made.figures,
            "notes": _hidden(made) + warnings_for(pipe, request.settings),
        }
        write_whole(folder / SUMMARY, json.dumps(summary).encode())
        found = self.load(folder.name)
        assert found is not None
        return found._replace(request=request)


def starting_image(folder: Path) -> str | None:
    """The image that those in a comparison's folder were started from, if there is one."""
    return next((str(file) for file in folder.glob(f"{START}.*")), None)


def _plain(name: str) -> str:
    """A name of a schedule as a part of a file's name."""
    return re.sub(r"[^\w]+", "-", name).strip("-")


def _hidden(made: Compared) -> list[str]:
    images = {ORIGINAL: made.unpatched, OURS: made.ours}
    return [f"{name}: {HIDDEN}" for name, image in images.items() if image.nsfw_content_detected]
