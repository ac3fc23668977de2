"""Images made since the page was opened: files with their settings, and how to restore them."""

from __future__ import annotations

import secrets
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import AgentSDError, SettingsError
from ..generation.records import ImageRecord
from ..image_settings import ImageSettings
from ..models.schedulers import common_name
from ..schedule import Schedule
from .catalog import OWN_SCHEDULER, ModelCatalog
from .request_options import restored_options
from .schedule_text import check_schedule

FILES_LAST = 3 * 3600
"""Seconds after which files that visitors made are deleted."""


class Entry(NamedTuple):
    """An image of the history."""

    file: str
    caption: str
    record: ImageRecord


class RestoredSettings(NamedTuple):
    """The settings of a record, as the page's controls take them."""

    settings: dict[str, Any]
    """Fields of :class:`agentsd.image_settings.ImageSettings`, within the limits, and what
    :func:`agentsd.app.request_options.read_options` takes."""
    scheduler: str
    model: str | None
    """``None`` for a model that is not in the catalog."""
    schedule: Schedule | None
    """``None`` for an unpatched image."""
    notes: list[str]
    """What was changed, and what cannot be restored."""


def new_folder(folder: str) -> Path:
    """A folder whose name nobody can guess; those that are too old are deleted.

    Args:
        folder: Folder of the page's files, which gradio serves.
    """
    secret = Path(folder) / secrets.token_hex(16)
    secret.mkdir(parents=True)
    for old in Path(folder).iterdir():
        with suppress(OSError):  # it is gone already
            if time.time() - old.stat().st_mtime > FILES_LAST:
                shutil.rmtree(old)
    return secret


def restore(
    record: ImageRecord, catalog: ModelCatalog, init_image: str | None = None
) -> RestoredSettings:
    """Read the settings of a record, which may come from anywhere.

    Args:
        record: The record of an image.
        catalog: What visitors can ask for.
        init_image: The file of the image that it was started from, where it is still there.

    Raises:
        SettingsError: If the image cannot be made here.
    """
    data = record.to_dict()
    try:
        # With the image's own size, which may be one that cannot be requested.
        given = {name: data[name] for name in ImageSettings.model_fields}
        settings = ImageSettings(**given)
        schedule = None if record.schedule is None else check_schedule(data["schedule"])
    except AgentSDError as error:
        raise SettingsError(f"the image's settings cannot be used: {error}") from None
    settings, notes = catalog.limits.fit(settings)
    model = record.model if record.model in catalog.sizes else None
    if model is None:
        notes.append(f"The model {Path(record.model).name} is not available here.")
    scheduler = OWN_SCHEDULER
    if record.scheduler is not None:
        wanted = common_name(record.scheduler)
        if wanted in catalog.schedulers[model or next(iter(catalog.sizes))]:
            scheduler = wanted
        else:
            notes.append(f"The scheduler {wanted} is not available here.")
    options, lost = restored_options(record.options, catalog.loras, init_image)
    if lost:
        notes.append(f"Not restored: {', '.join(lost)}.")
    return RestoredSettings(settings.model_dump() | options, scheduler, model, schedule, notes)
