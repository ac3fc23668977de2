"""Regenerate an image from the record in its file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from ..image_settings import ImageSettings, is_size
from ..models.adapters import PipelineOptions, recorded_fingerprints
from ..models.loading import DTYPES
from ..schedule import Schedule
from .batch.launch import Request
from .image_files import read_record
from .records import VERSIONS

LARGEST_BATCH = 1024
"""Images."""


class Regeneration(NamedTuple):
    """How to make an image again."""

    prompt: str
    request: Request
    notes: list[str]
    """Each version of a library that is not the recorded one."""


def regeneration(image: Path, out: Path) -> Regeneration:
    """Read from an image file what makes the image again.

    Args:
        image: A file that agentsd made.
        out: Folder of the new run.

    Raises:
        SettingsError: If the file carries no record of agentsd, or one that cannot be used.
    """
    record = read_record(image)
    settings = {name: record[name] for name in ImageSettings.model_fields if name in record}
    prompt = str(settings.pop("prompt", ""))
    if not is_size(settings.get("height"), settings.get("width")):
        settings |= {"height": None, "width": None}  # of the model's size, or the one on record
    request = Request(
        out=out,
        base=settings,
        schedule=Schedule.from_dict(record["schedule"]) if record.get("schedule") else None,
        options=PipelineOptions.from_record(record),
        model=str(record.get("model")),
        revision=record.get("revision"),
        variant=record.get("variant"),
        dtype=record["dtype"] if record.get("dtype") in list(DTYPES) else None,
        place=_place_in_batch(record.get("batch")),
        known=recorded_fingerprints(record),
    )
    notes = [
        f"made with {name} {record.get(name)}, regenerated with {version}"
        for name, version in VERSIONS.items()
        if record.get(name) != version
    ]
    return Regeneration(prompt, request, notes)


def _place_in_batch(recorded: Any) -> tuple[int, int] | None:
    """The place in its batch that an image was made at, where the record holds a valid one."""
    match recorded:
        case [int(place), int(size)] if 0 <= place < size <= LARGEST_BATCH:
            return place, size
    return None
