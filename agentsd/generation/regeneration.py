"""Regenerate an image from the record in its file."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ..models.loading import DTYPES
from .batch.request import BatchRequest
from .image_files import read_record
from .records import VERSIONS


class Regeneration(NamedTuple):
    """How to regenerate an image."""

    prompt: str
    request: BatchRequest
    notes: list[str]
    """Each library whose version differs from the recorded one."""


def regeneration(image: Path, out: Path) -> Regeneration:
    """Read from an image file how to regenerate the image.

    Args:
        image: A file that agentsd made.
        out: Folder of the new run.

    Raises:
        SettingsError: If the file has no agentsd record, or an unusable one.
    """
    record = read_record(image)
    request = BatchRequest(
        out=out,
        base=record.settings.model_dump(exclude={"prompt"}),
        schedule=record.schedule,
        options=record.options,
        model=record.model,
        revision=record.revision,
        variant=record.variant,
        dtype=record.dtype if record.dtype in DTYPES else None,
        batch_position=record.batch,
        known=record.fingerprints(),
    )
    notes = [
        f"made with {name} {record.versions.get(name)}, regenerated with {version}"
        for name, version in VERSIONS.items()
        if record.versions.get(name) != version
    ]
    return Regeneration(record.settings.prompt, request, notes)
