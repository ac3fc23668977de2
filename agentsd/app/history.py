"""Images made since the page was opened: files that carry their settings, and the way back."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ..errors import AgentSDError, SettingsError
from ..generation.image_files import encode_image, write_whole
from ..generation.records import ImageRecord
from ..image_settings import ImageSettings
from ..models.schedulers import common_name
from ..schedule import Schedule
from .limits import OWN, checked

KEPT = 24
"""Images that a visitor's gallery shows; the oldest go."""


class Entry(NamedTuple):
    """An image of the gallery."""

    file: str
    caption: str
    record: ImageRecord


class Restored(NamedTuple):
    """What a record says, as the page's controls take it."""

    settings: dict[str, Any]
    """Those of :class:`agentsd.image_settings.ImageSettings` that the record names."""
    scheduler: str
    model: str | None
    """``None`` where it is none of the models here."""
    schedule: Schedule | None
    """``None`` for an unpatched image."""


def keep(folder: str, image: Image.Image, record: ImageRecord, caption: str) -> Entry:
    """Write an image with its settings to a file whose name nobody can guess.

    Args:
        folder: Where the page's files lie, of which gradio shows them.
        image: What was made.
        record: Of the image.
        caption: Told beside the image.
    """
    data = encode_image(image, record)
    return Entry(_written(folder, f"agentsd-{record.settings.seed}.png", data), caption, record)


def keep_plain(folder: str, image: Image.Image, name: str) -> str:
    """Write an image without settings, likewise; returns its file."""
    return _written(folder, name, encode_image(image))


def _written(folder: str, name: str, data: bytes) -> str:
    place = Path(folder) / secrets.token_hex(16)
    place.mkdir(parents=True)
    write_whole(place / name, data)
    return str(place / name)


def restore(
    record: ImageRecord, models: list[str], schedulers: Mapping[str, list[str]]
) -> Restored:
    """Read the settings of a record, which may come from anywhere.

    Raises:
        SettingsError: If its image cannot be made here.
    """
    data = record.to_dict()
    try:
        # With the image's own size, which may be one that cannot be asked for.
        given = {name: data[name] for name in ImageSettings.model_fields}
        settings = ImageSettings(**given).model_dump()
        schedule = None if record.schedule is None else checked(data["schedule"])
    except AgentSDError as error:
        raise SettingsError(f"the image's settings cannot be used: {error}") from None
    scheduler = common_name(str(record.scheduler))
    known = scheduler in schedulers.get(record.model, [])
    model = record.model if record.model in models else None
    return Restored(settings, scheduler if known else OWN, model, schedule)
