"""Images made since the page was opened: files with their settings, and how to restore them."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ..errors import AgentSDError, SettingsError
from ..generation.image_files import encode_image, write_whole
from ..generation.records import ImageRecord
from ..image_settings import ImageSettings
from ..models.schedulers import common_name
from ..schedule import Schedule
from .catalog import OWN_SCHEDULER, ModelCatalog
from .schedule_text import check_schedule

MAX_ENTRIES = 24
"""Images in a visitor's gallery; the oldest go first."""


class Entry(NamedTuple):
    """An image of the gallery."""

    file: str
    caption: str
    record: ImageRecord


class RestoredSettings(NamedTuple):
    """The settings of a record, as the page's controls take them."""

    settings: dict[str, Any]
    """Fields of :class:`agentsd.image_settings.ImageSettings`."""
    scheduler: str
    """Its common name, which the model that is chosen may not have."""
    model: str | None
    """``None`` for a model that is not in the catalog."""
    schedule: Schedule | None
    """``None`` for an unpatched image."""


def save(folder: str, image: Image.Image, record: ImageRecord, caption: str) -> Entry:
    """Write an image with its settings to a file whose name nobody can guess.

    Args:
        folder: Folder of the page's files, which gradio serves.
        image: The image.
        record: The record of the image.
        caption: Shown with the image.
    """
    data = encode_image(image, record)
    return Entry(write_file(folder, f"agentsd-{record.settings.seed}.png", data), caption, record)


def save_plain(folder: str, image: Image.Image, name: str) -> str:
    """Write an image without settings, as :func:`save` does; returns its path."""
    return write_file(folder, name, encode_image(image))


def write_file(folder: str, name: str, data: bytes) -> str:
    """Write a file under a folder that nobody can guess; returns its path."""
    secret = Path(folder) / secrets.token_hex(16)
    secret.mkdir(parents=True)
    write_whole(secret / name, data)
    return str(secret / name)


def restore(record: ImageRecord, catalog: ModelCatalog) -> RestoredSettings:
    """Read the settings of a record, which may come from anywhere.

    Raises:
        SettingsError: If the image cannot be made here.
    """
    data = record.to_dict()
    try:
        # With the image's own size, which may be one that cannot be requested.
        given = {name: data[name] for name in ImageSettings.model_fields}
        settings = ImageSettings(**given).model_dump()
        schedule = None if record.schedule is None else check_schedule(data["schedule"])
    except AgentSDError as error:
        raise SettingsError(f"the image's settings cannot be used: {error}") from None
    model = record.model if record.model in catalog.sizes else None
    scheduler = common_name(str(record.scheduler))
    if model is not None and scheduler not in catalog.schedulers[model]:
        scheduler = OWN_SCHEDULER
    return RestoredSettings(settings, scheduler, model, schedule)
