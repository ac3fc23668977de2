"""The models and schedulers on offer, and a visitor's request checked against them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from diffusers import DiffusionPipeline

from ...errors import SettingsError
from ...image_settings import ImageSettings
from ...models.loading import default_guidance
from ...models.options import PipelineOptions
from ...models.schedulers import COMMON_NAMES
from ...schedule import Schedule
from ...settings import StrictModel, short_repr
from .limits import Limits
from .request_options import OPTIONS, read_options
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
        images: How many seeds to compare, from that of the settings on.
        options: An image to start from, and LoRAs.
    """

    error: ClassVar = SettingsError

    model: str
    settings: ImageSettings
    schedule: Schedule
    scheduler: str | None = None
    images: int = 1
    options: PipelineOptions = PipelineOptions()

    def seeds(self) -> list[ImageRequest]:
        """A request for each of its seeds."""
        first = self.settings.seed
        return [
            self.model_copy(
                update={"settings": self.settings.model_copy(update={"seed": first + i})}
            )
            for i in range(self.images)
        ]


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
    loras: Mapping[str, str] = field(default_factory=dict)
    """Paths of the LoRAs that visitors may choose, by name."""

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
        self,
        *,
        model: Any,
        schedule: Any,
        scheduler: Any = None,
        images: Any = 1,
        **given: Any,
    ) -> ImageRequest:
        """Check what a visitor asks for.

        Args:
            model: Name of a model.
            schedule: As for :func:`read_schedule`.
            scheduler: Name of a scheduler, or :data:`OWN_SCHEDULER`.
            images: How many seeds to compare.
            **given: As for :meth:`settings` and :func:`read_options`.

        Raises:
            SettingsError: Names the setting, its value and what is allowed.
            ScheduleError: If the schedule is not valid.
        """
        options = {name: given.pop(name) for name in OPTIONS if given.get(name) is not None}
        settings = self.settings(model, **{k: v for k, v in given.items() if k not in OPTIONS})
        name = None if scheduler in (None, OWN_SCHEDULER) else scheduler
        self.check_scheduler(model, name)
        check_images(images, self.limits.max_images)
        return ImageRequest(
            model=model,
            settings=settings,
            schedule=read_schedule(schedule),
            scheduler=name,
            images=images,
            options=read_options(settings, self.loras, **options),
        )


def check_images(images: Any, most: int) -> None:
    """Refuse a number of seeds that makes more images than ``most``.

    Raises:
        SettingsError: Says how many there may be.
    """
    if type(images) is not int or not 1 <= images <= most // 2:
        raise SettingsError(f"images: must be 1 to {most // 2} (got {short_repr(images)})")


def model_catalog(
    pipes: Mapping[str, DiffusionPipeline],
    limits: Limits,
    loras: Mapping[str, str] | None = None,
) -> ModelCatalog:
    """The catalog of some pipelines, by name."""
    sizes, schedulers = {}, {}
    for name, pipe in pipes.items():
        side = pipe.unet.config.sample_size
        rows, columns = (side, side) if isinstance(side, int) else side
        sizes[name] = rows * pipe.vae_scale_factor, columns * pipe.vae_scale_factor
        kinds = {kind.__name__ for kind in pipe.scheduler.compatibles}
        schedulers[name] = sorted(COMMON_NAMES[kind] for kind in kinds & COMMON_NAMES.keys())
    return ModelCatalog(limits, sizes, schedulers, loras or {})
