"""What a visitor may ask for, checked on the server whatever the page or a client sends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from diffusers import DiffusionPipeline
from PIL import Image
from pydantic import Field
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from ..errors import ScheduleError, SettingsError
from ..generation.image_files import read_record
from ..generation.records import ImageRecord
from ..image_settings import ImageSettings
from ..models.loading import default_guidance
from ..models.schedulers import COMMON_NAMES
from ..schedule import Schedule
from ..settings import StrictModel, parse_yaml, short_repr

MAX_YAML = 16 * 1024
"""Bytes of a schedule; the presets have less than 1,000."""

MAX_BRACKETS = 64
"""Of a schedule; nested by the thousand, they take a parser minutes."""

MAX_PHASES = 16
"""Of a schedule."""

MAX_PNG = 20 * 2**20
"""Bytes of an image that is read for its settings."""

MAX_PNG_PIXELS = 64 * 2**20
"""Of such an image."""

OWN = "model's own"
"""Stands for the scheduler that a model came with."""


class Limits(StrictModel):
    """What one visitor may ask of the device, and how many may wait.

    Args:
        max_pixels: Width times height of an image.
        max_steps: Denoising steps of an image.
        max_images: Images of one X/Y plot; a comparison makes two.
        queue_size: Requests that may wait; more are turned away.

    Raises:
        SettingsError: If one is out of range.
    """

    error: ClassVar = SettingsError

    max_pixels: Annotated[int, Field(ge=64 * 64, le=2**26)] = 1024 * 1024
    max_steps: Annotated[int, Field(ge=1, le=1000)] = 100
    max_images: Annotated[int, Field(ge=2, le=256)] = 16
    queue_size: Annotated[int, Field(ge=1, le=10_000)] = 32

    def check(self, settings: ImageSettings) -> None:
        """Refuse an image of known size that is too large or takes too many steps.

        Raises:
            SettingsError: Names the limit.
        """
        if settings.num_inference_steps > self.max_steps:
            raise SettingsError(
                f"num_inference_steps: at most {self.max_steps} here "
                f"(got {settings.num_inference_steps})"
            )
        pixels = (settings.height or 0) * (settings.width or 0)
        if pixels > self.max_pixels:
            raise SettingsError(
                f"{settings.width}×{settings.height} is {pixels:,} pixels; "
                f"at most {self.max_pixels:,} here"
            )


class Request(StrictModel):
    """An image as a visitor asks for it, checked.

    Args:
        model: One of those named at the start.
        settings: Of the image, its size among them.
        schedule: What to patch with.
        scheduler: Name of a scheduler; ``None`` is the model's own.
    """

    error: ClassVar = SettingsError

    model: str
    settings: ImageSettings
    schedule: Schedule
    scheduler: str | None = None


@dataclass(frozen=True)
class ModelCatalog:
    """What there is to ask for.

    Args:
        limits: How much may be asked for.
        sizes: Height and width, in pixels, that each model makes if not told otherwise.
        schedulers: Names of the schedulers of each model.
    """

    limits: Limits
    sizes: Mapping[str, tuple[int, int]]
    schedulers: Mapping[str, list[str]]

    def settings(self, model: Any, **given: Any) -> ImageSettings:
        """Check the settings of an image.

        Args:
            model: Name of a model.
            **given: The settings of :class:`ImageSettings`; ``None`` is what the model takes.

        Raises:
            SettingsError: Names the setting, its value and what is allowed.
        """
        if not isinstance(model, str) or model not in self.sizes:
            raise SettingsError(
                f"model: there are {', '.join(self.sizes)} (got {short_repr(model)})"
            )
        height, width = self.sizes[model]
        usual = {"height": height, "width": width, "guidance_scale": default_guidance(model)}
        told = {name: value for name, value in given.items() if value is not None}
        settings = ImageSettings(**usual | told)
        self.limits.check(settings)
        return settings

    def check_scheduler(self, model: str, name: Any) -> None:
        """Refuse a scheduler that is none of the model's; ``None`` is its own.

        Raises:
            SettingsError: Lists those there are.
        """
        if name is not None and name not in self.schedulers[model]:
            raise SettingsError(
                f"scheduler: there are {', '.join(self.schedulers[model])} for this model "
                f"(got {short_repr(name)})"
            )

    def request(self, *, model: Any, schedule: Any, scheduler: Any = None, **given: Any) -> Request:
        """Check what a visitor asks for.

        Args:
            model: Name of a model.
            schedule: As for :func:`read_schedule`.
            scheduler: A scheduler's name, or :data:`OWN`.
            **given: As for :meth:`settings`.

        Raises:
            SettingsError: Names the setting, its value and what is allowed.
            ScheduleError: If the schedule is not valid.
        """
        settings = self.settings(model, **given)
        named = None if scheduler in (None, OWN) else scheduler
        self.check_scheduler(model, named)
        plan = read_schedule(schedule)
        return Request(model=model, settings=settings, schedule=plan, scheduler=named)


def model_catalog(pipes: Mapping[str, DiffusionPipeline], limits: Limits) -> ModelCatalog:
    """What there is to ask of pipelines, by name."""
    sizes, schedulers = {}, {}
    for name, pipe in pipes.items():
        side = pipe.unet.config.sample_size
        rows, columns = (side, side) if isinstance(side, int) else side
        sizes[name] = rows * pipe.vae_scale_factor, columns * pipe.vae_scale_factor
        kinds = {kind.__name__ for kind in pipe.scheduler.compatibles}
        schedulers[name] = sorted(COMMON_NAMES[kind] for kind in kinds & COMMON_NAMES.keys())
    return ModelCatalog(limits, sizes, schedulers)


def read_schedule(text: Any) -> Schedule:
    """A schedule from a preset's name or YAML text; never from a file.

    Raises:
        ScheduleError: As for :func:`read_yaml` and :func:`checked`.
    """
    if isinstance(text, str) and text in Schedule.presets():
        return Schedule.preset(text)
    return checked(read_yaml(text))


def checked(data: Any) -> Schedule:
    """The schedule that plain values tell.

    Raises:
        ScheduleError: In the words that YAML's errors have, and if it has too many phases.
    """
    try:
        schedule = Schedule.from_dict(data)
    except ScheduleError as error:
        raise ScheduleError(f"YAML text: {error}") from None
    if len(schedule.phases) > MAX_PHASES:
        raise ScheduleError(f"at most {MAX_PHASES} phases here (got {len(schedule.phases)})")
    return schedule


def read_yaml(text: Any) -> Any:
    """What the YAML of a schedule holds, valid or not; safe and quick whatever it is.

    Raises:
        ScheduleError: If it is no YAML, too long, too deep, or has anchors, by which a short text
            can stand for an endless one.
    """
    if not isinstance(text, str):
        raise ScheduleError(f"a preset's name or YAML text was expected (got {short_repr(text)})")
    size = len(text.encode(errors="replace"))
    if size > MAX_YAML:
        raise ScheduleError(f"the YAML may have at most {MAX_YAML:,} bytes (got {size:,})")
    if text.count("[") + text.count("{") > MAX_BRACKETS:
        raise ScheduleError(f"the YAML may have at most {MAX_BRACKETS} brackets")
    if line := _first_anchor(text):
        raise ScheduleError(f"YAML text: line {line}: anchors are not allowed here")
    return parse_yaml(text, "YAML text", ScheduleError)


def _first_anchor(text: str) -> int | None:
    try:
        for event in YAML(typ="safe", pure=True).parse(text):
            if getattr(event, "anchor", None) is not None:
                return int(event.start_mark.line) + 1
    except (YAMLError, ValueError, RecursionError):
        pass  # is told, with its line, by what reads it
    return None


def read_upload(path: str | Path) -> ImageRecord:
    """The record in a PNG that a visitor gave, which may be anything.

    Raises:
        SettingsError: If it is no PNG of agentsd, or too large.
    """
    file = Path(path)
    if file.stat().st_size > MAX_PNG:
        raise SettingsError(f"the file may have at most {MAX_PNG // 2**20} MB")
    try:
        with Image.open(file, formats=["PNG"]) as image:
            pixels = image.width * image.height
    except (OSError, ValueError, Image.DecompressionBombError):
        raise SettingsError("that file is no PNG image") from None
    if pixels > MAX_PNG_PIXELS:
        raise SettingsError(f"the image may have at most {MAX_PNG_PIXELS:,} pixels")
    return read_record(file)
