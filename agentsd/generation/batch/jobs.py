"""Jobs: one per image, made from checked prompts, and the batches that they run in."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from ...image_settings import ImageSettings, image_seed
from ...schedule import Schedule
from .prompts import PromptRow


class Job(NamedTuple):
    """An image to make."""

    number: int
    """Its position in the run, from 0."""
    id: str
    prompt_index: int
    image_index: int
    settings: ImageSettings
    schedule: Schedule | None

    @property
    def batch_key(self) -> tuple[Any, ...]:
        """What the jobs of a batch have in common."""
        s = self.settings
        return s.height, s.width, s.num_inference_steps, s.guidance_scale, self.schedule

    def identity(self) -> dict[str, Any]:
        """What manifests and ``failed.jsonl`` identify the image by."""
        return {
            "id": self.id,
            "number": self.number,
            "prompt_index": self.prompt_index,
            "image_index": self.image_index,
            "prompt": self.settings.prompt,
            "seed": self.settings.seed,
        }


def jobs(rows: Path, base: Mapping[str, Any], schedule: Schedule | None) -> Iterator[Job]:
    """The images of a list of prompts, in order; the file is read as they are asked for.

    Args:
        rows: The rows of a :class:`PromptList`, as a file.
        base: The settings that the prompts were checked with; its ``seed`` is the run's.
        schedule: Of rows without one of their own.
    """
    number = 0
    with rows.open("rb") as file:
        for line in file:
            given = json.loads(line)
            index = given.pop("index")
            row = PromptRow(**{**base, **given})
            settings = row.model_dump(exclude={"id", "count", "schedule"})
            # A row with its own seed starts its own list of seeds.
            place = 0 if "seed" in given else index
            own = schedule if row.schedule is None else row.read_schedule()
            for i, name in enumerate(row.ids(number)):
                settings["seed"] = image_seed(row.seed, place, i)
                yield Job(number + i, name, index, i, ImageSettings(**settings), own)
            number += row.count


def batches(jobs: Iterator[Job], size: int) -> Iterator[list[Job]]:
    """Group jobs that can run together, at most ``size`` at a time.

    Which jobs share a batch depends only on the list and the size, not on what is already made: on
    some devices the last bits of an image vary with the size of its batch, and a resumed run must
    end like an uninterrupted one.
    """
    while window := list(islice(jobs, 4 * size)):
        groups: dict[tuple[Any, ...], list[Job]] = {}
        for job in window:
            groups.setdefault(job.batch_key, []).append(job)
        for alike in groups.values():
            for start in range(0, len(alike), size):
                yield alike[start : start + size]
