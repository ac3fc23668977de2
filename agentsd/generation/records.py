"""The record of an image: all that makes it again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline

from .. import __version__
from ..image_settings import ImageSettings
from ..schedule import Schedule


def record(
    pipe: DiffusionPipeline,
    settings: ImageSettings,
    model: str,
    schedule: Schedule | None,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """All that makes an image, as plain values, and nothing of where and when it was made.

    Args:
        pipe: What made it.
        settings: Its settings.
        model: What the pipeline was loaded from.
        schedule: ``None`` for an unpatched image.
        options: What was added to the pipeline: fields of
            :class:`agentsd.models.adapters.PipelineOptions`.
    """
    return {**settings.model_dump(), **shared_record(pipe, model, schedule, options)}


def shared_record(
    pipe: DiffusionPipeline,
    model: str,
    schedule: Schedule | None,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What of a :func:`record` all images of a pipeline share; who makes many asks once."""
    return {
        "model": model,
        "scheduler": type(pipe.scheduler).__name__,
        "schedule": schedule.to_dict() if schedule else None,
        "schedule_hash": schedule_hash(schedule),
        **(options or {}),
        "device": pipe._execution_device.type,
        "dtype": str(pipe.dtype).removeprefix("torch."),
        **VERSIONS,
    }


VERSIONS = {
    "agentsd": __version__,
    "torch": torch.__version__,
    "diffusers": diffusers.__version__,
    "transformers": transformers.__version__,
}


def schedule_hash(schedule: Schedule | None) -> str | None:
    """Sixteen hexadecimal digits that tell schedules apart; ``None`` for none."""
    if schedule is None:
        return None
    text = json.dumps(schedule.to_dict(), sort_keys=True)
    return sha256(text.encode()).hexdigest()[:16]
