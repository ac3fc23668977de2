"""The models and schedulers on offer, and a visitor's request checked against them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from diffusers import DiffusionPipeline

from ..errors import SettingsError
from ..image_settings import ImageSettings
from ..models.loading import default_guidance
from ..models.schedulers import COMMON_NAMES
from ..schedule import Schedule
from ..settings import StrictModel, short_repr
from .limits import Limits
from .schedule_text import read_schedule

OWN_SCHEDULER = "model's own"
"""Name of the scheduler that a model came with."""


class ImageRequest(StrictModel):
    """An image that a visitor may have.

    Args:
        model: Name of a model of the catalog.
        settings: Settings of the image, including its size.
        schedule: What to patch the model with.
        scheduler: Name of a scheduler; ``None`` for the model's own.
    """

    error: ClassVar = SettingsError

    model: str
    settings: ImageSettings
    schedule: Schedule
    scheduler: str | None = None


@dataclass(frozen=True)
class ModelCatalog:
    """What visitors can ask for.

    Args:
        limits: How much of it.
        sizes: Default height and width of each model, in pixels.
        schedulers: Names of the schedulers of each model.
    """

    limits: Limits
    sizes: Mapping[str, tuple[int, int]]
    schedulers: Mapping[str, list[str]]

    def settings(self, model: Any, **given: Any) -> ImageSettings:
        """Check the settings of an image.

        Args:
            model: Name of a model.
            **given: Fields of :class:`ImageSettings`; ``None`` for the model's default.

        Raises:
            SettingsError: Names the setting, its value and what is allowed.
        """
        if not isinstance(model, str) or model not in self.sizes:
            raise SettingsError(
                f"model: must be one of {', '.join(self.sizes)} (got {short_repr(model)})"
            )
        height, width = self.sizes[model]
        defaults = {"height": height, "width": width, "guidance_scale": default_guidance(model)}
        changes = {name: value for name, value in given.items() if value is not None}
        settings = ImageSettings(**defaults | changes)
        self.limits.check(settings)
        return settings

    def check_scheduler(self, model: str, name: Any) -> None:
        """Refuse a scheduler that the model does not have; ``None`` is the model's own.

        Raises:
            SettingsError: Lists those it has.
        """
        if name is not None and name not in self.schedulers[model]:
            raise SettingsError(
                f"scheduler: must be one of {', '.join(self.schedulers[model])} for this model "
                f"(got {short_repr(name)})"
            )

    def request(
        self, *, model: Any, schedule: Any, scheduler: Any = None, **given: Any
    ) -> ImageRequest:
        """Check what a visitor asks for.

        Args:
            model: Name of a model.
            schedule: As for :func:`read_schedule`.
            scheduler: Name of a scheduler, or :data:`OWN_SCHEDULER`.
            **given: As for :meth:`settings`.

        Raises:
            SettingsError: Names the setting, its value and what is allowed.
            ScheduleError: If the schedule is not valid.
        """
        settings = self.settings(model, **given)
        name = None if scheduler in (None, OWN_SCHEDULER) else scheduler
        self.check_scheduler(model, name)
        return ImageRequest(
            model=model, settings=settings, schedule=read_schedule(schedule), scheduler=name
        )


def model_catalog(pipes: Mapping[str, DiffusionPipeline], limits: Limits) -> ModelCatalog:
    """The catalog of some pipelines, by name."""
    sizes, schedulers = {}, {}
    for name, pipe in pipes.items():
        side = pipe.unet.config.sample_size
        rows, columns = (side, side) if isinstance(side, int) else side
        sizes[name] = rows * pipe.vae_scale_factor, columns * pipe.vae_scale_factor
        kinds = {kind.__name__ for kind in pipe.scheduler.compatibles}
        schedulers[name] = sorted(COMMON_NAMES[kind] for kind in kinds & COMMON_NAMES.keys())
    return ModelCatalog(limits, sizes, schedulers)
