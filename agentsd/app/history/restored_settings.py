"""The settings of an image's record, as the page's controls take them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from ...errors import AgentSDError, SettingsError
from ...generation.records import ImageRecord
from ...image_settings import ImageSettings
from ...models.schedulers import common_name
from ...schedule import Schedule
from ..requests.catalog import OWN_SCHEDULER, ModelCatalog
from ..requests.request_options import restored_options
from ..requests.schedule_text import check_schedule


class RestoredSettings(NamedTuple):
    """The settings of a record, as the page's controls take them."""

    settings: dict[str, Any]
    """Fields of :class:`agentsd.image_settings.ImageSettings`, within the limits, and what
    :func:`agentsd.app.requests.request_options.read_options` takes."""
    scheduler: str
    model: str | None
    """``None`` for a model that is not in the catalog."""
    schedule: Schedule | None
    """``None`` for an unpatched image."""
    notes: list[str]
    """What was changed, and what cannot be restored."""


def restore(
    record: ImageRecord, catalog: ModelCatalog, init_image: str | None = None
) -> RestoredSettings:
    """Read the settings of a record, which may come from anywhere.

    Args:
        record: The record of an image.
        catalog: What visitors can ask for.
        init_image: The file of its initial image, if that still exists.

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
