"""The conditions that a run's speed and likeness depend on, besides its schedule."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from diffusers import DiffusionPipeline

from ..measured import TunedFor
from ..models.devices import device_name
from ..schedule import Schedule


def conditions(
    pipe: DiffusionPipeline, settings: Mapping[str, Any], model: str, weights: str | None
) -> TunedFor:
    """The conditions of a run.

    Args:
        pipe: The pipeline.
        settings: Those of an image, by name.
        model: What the pipeline was loaded from.
        weights: The fingerprint of that.
    """
    own = pipe.unet.config.sample_size
    sides = dict(zip(("height", "width"), (own, own) if isinstance(own, int) else own, strict=True))
    return TunedFor(
        model=model,
        weights=weights,
        scheduler=type(pipe.scheduler).__name__,
        num_inference_steps=settings["num_inference_steps"],
        guidance_scale=float(settings["guidance_scale"]),
        **{n: settings.get(n) or side * pipe.vae_scale_factor for n, side in sides.items()},
        device=device_name(pipe._execution_device),
        dtype=str(pipe.dtype).removeprefix("torch."),
    )


def warn_if_tuned_for_others(schedule: Schedule, now: TunedFor) -> None:
    """Warn where a schedule was tuned for other conditions than those of a run."""
    if schedule.tuned_for is None:
        return
    if found := schedule.tuned_for.differences(now):
        warnings.warn(
            f"this schedule was tuned for another run: {'; '.join(found)}; its figures do not hold "
            "here, and agentsd tune finds the schedule that suits this one",
            stacklevel=3,
        )
