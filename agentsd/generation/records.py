"""The record of an image: all that is needed to make it again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline

from ..image_settings import ImageSettings, is_size
from ..models.options import IMAGES, PipelineOptions, recorded_fingerprints
from ..schedule import Schedule
from ..version import __version__

VERSIONS = {
    "agentsd": __version__,
    "torch": torch.__version__,
    "diffusers": diffusers.__version__,
    "transformers": transformers.__version__,
}


@dataclass(frozen=True)
class ImageRecord:
    """All that an image depends on, but not where, when or under which name it was made.

    Image files carry it as JSON (:meth:`to_dict`), and each line of a manifest begins with it.

    Args:
        settings: What was asked for; without height and width where the image has a size that
            cannot be asked for.
        model: What the pipeline was loaded from.
        scheduler: Class name of the scheduler.
        schedule: ``None`` for an unpatched image.
        revision: Commit of a model on the hub.
        variant: Which of the model's weights were loaded, where there are several.
        weights: Fingerprints of the weights, by path or hub id.
        options: What was added to the pipeline.
        image_hashes: SHA-256 of the images that the options name, by ``SETTING_sha256``.
        device: Type of the device.
        dtype: ``float32``, ``float16`` or ``bfloat16``.
        versions: Of agentsd and the libraries, by name.
        size: Width and height, in pixels.
        batch: The image's index in its batch and the size of the batch, since kernels round
            differently at different batch sizes.
    """

    settings: ImageSettings
    model: str
    scheduler: str | None = None
    schedule: Schedule | None = None
    revision: str | None = None
    variant: str | None = None
    weights: Mapping[str, str | None] | None = None
    options: PipelineOptions = field(default_factory=PipelineOptions)
    image_hashes: Mapping[str, str] = field(default_factory=dict)
    device: str | None = None
    dtype: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    size: tuple[int, int] | None = None
    batch: tuple[int, int] | None = None

    @classmethod
    def of(
        cls,
        pipe: DiffusionPipeline,
        settings: ImageSettings,
        model: str,
        schedule: Schedule | None,
        options: Mapping[str, Any] | None = None,
    ) -> ImageRecord:
        """The record of an image that a pipeline makes.

        It takes milliseconds; for many images of one pipeline, replace the settings of one record.

        Args:
            pipe: The pipeline.
            settings: Of the image.
            model: What the pipeline was loaded from.
            schedule: ``None`` for an unpatched image.
            options: Which weights were loaded and what was added to the pipeline, as
                :meth:`agentsd.generation.batch.request.BatchRequest.recorded` returns it.
        """
        data = {
            **settings.model_dump(),
            "model": model,
            "scheduler": type(pipe.scheduler).__name__,
            **(options or {}),
            "device": pipe._execution_device.type,
            "dtype": str(pipe.dtype).removeprefix("torch."),
            **VERSIONS,
        }
        return replace(cls.from_dict(data), schedule=schedule)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ImageRecord:
        """Read a record, of any version of agentsd; unknown keys are ignored.

        Raises:
            SettingsError: If its settings or options are not valid.
            ScheduleError: If its schedule is not valid.
        """
        settings = {name: data[name] for name in ImageSettings.model_fields if name in data}
        size = _two_integers((data.get("width"), data.get("height")), least=1)
        if size is not None and not is_size(*reversed(size)):
            settings |= {"height": None, "width": None}
        schedule, weights = data.get("schedule"), data.get("weights")
        hashes = {name: data.get(name) for name in (f"{image}_sha256" for image in IMAGES)}
        versions = {name: data.get(name) for name in VERSIONS}
        return cls(
            settings=ImageSettings(**settings),
            model=str(data.get("model")),
            scheduler=_text(data.get("scheduler")),
            schedule=Schedule.from_dict(schedule) if schedule else None,
            revision=_text(data.get("revision")),
            variant=_text(data.get("variant")),
            weights=weights if isinstance(weights, dict) else None,
            options=PipelineOptions.from_record(data),
            image_hashes={k: value for k, value in hashes.items() if isinstance(value, str)},
            device=_text(data.get("device")),
            dtype=_text(data.get("dtype")),
            versions={k: value for k, value in versions.items() if isinstance(value, str)},
            size=size,
            batch=_batch_position(data.get("batch")),
        )

    def to_dict(self) -> dict[str, Any]:
        """The record as plain values, for JSON."""
        size = {} if self.size is None else dict(zip(("width", "height"), self.size, strict=True))
        return {
            **self.settings.model_dump(),
            **size,
            "model": self.model,
            "scheduler": self.scheduler,
            "schedule": self.schedule.to_dict() if self.schedule else None,
            "schedule_hash": schedule_hash(self.schedule),
            "revision": self.revision,
            "variant": self.variant,
            "weights": self.weights,
            **self.options.settings_record(),
            **self.image_hashes,
            "device": self.device,
            "dtype": self.dtype,
            **self.versions,
            **({} if self.batch is None else {"batch": list(self.batch)}),
        }

    def fingerprints(self) -> dict[str, Any]:
        """Fingerprints of all files that the image depends on, by path or hub id."""
        return recorded_fingerprints(self.to_dict())


def manifest_entry(
    record: ImageRecord,
    *,
    number: int,
    seconds: float,
    nsfw_content_detected: bool | None,
    **more: Any,
) -> dict[str, Any]:
    """What a manifest says of an image before its file is written.

    Args:
        record: Of the image.
        number: Its position in the run, from 0.
        seconds: What it took to make.
        nsfw_content_detected: Whether a safety checker replaced it with a black image.
        **more: What else is known of it, its ``id`` among that.
    """
    return {
        "number": number,
        **record.to_dict(),
        **more,
        "seconds": round(seconds, 4),
        "nsfw_content_detected": nsfw_content_detected,
    }


def schedule_hash(schedule: Schedule | None) -> str | None:
    """Sixteen hexadecimal digits that identify a schedule; ``None`` for none."""
    if schedule is None:
        return None
    text = json.dumps(schedule.to_dict(), sort_keys=True)
    return sha256(text.encode()).hexdigest()[:16]


LARGEST_BATCH = 1024
"""Images in a batch."""


def _batch_position(value: Any) -> tuple[int, int] | None:
    """An index in a batch and the batch's size, if they can be that."""
    position = _two_integers(value, least=0)
    return position if position and position[0] < position[1] <= LARGEST_BATCH else None


def _two_integers(value: Any, least: int) -> tuple[int, int] | None:
    match value:
        case [int(a), int(b)] if min(a, b) >= least:
            return a, b
    return None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
