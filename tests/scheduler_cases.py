"""The schedulers of diffusers that tests go through, by class and as users configure them."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
from diffusers import DDIMScheduler

from agentsd import SettingsError
from agentsd.models.schedulers import scheduler_for

NAMES = sorted(kind.__name__ for kind in DDIMScheduler().compatibles)


def given(pipe: Any, name: str) -> Any:
    """The pipeline with another scheduler."""
    try:
        pipe.scheduler = scheduler_for(pipe, name)
    except SettingsError as error:
        if not isinstance(error.__cause__, ImportError):
            raise
        pytest.skip(str(error))
    return pipe


def seeded(pipe: Any) -> Any:
    """The pipeline, with a seed for a scheduler that takes no generators."""
    if hasattr(pipe.scheduler, "noise_sampler_seed"):
        pipe.scheduler.noise_sampler_seed = 0
    return pipe


SCHEDULERS: dict[str, tuple[str, dict[str, Any], list[int]]] = {
    # name: class, configuration, UNet calls of the first 20, the next 10 and the last 20 steps
    "DDIM": ("DDIMScheduler", {"clip_sample": False}, [20, 10, 20]),
    "DDIM trailing": ("DDIMScheduler", {"timestep_spacing": "trailing"}, [20, 10, 20]),
    "DDPM": ("DDPMScheduler", {}, [20, 10, 20]),
    "PNDM": ("PNDMScheduler", {"skip_prk_steps": True}, [21, 10, 20]),
    "Euler": ("EulerDiscreteScheduler", {}, [20, 10, 20]),
    "Euler a": ("EulerAncestralDiscreteScheduler", {}, [20, 10, 20]),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {}, [20, 10, 20]),
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, [20, 10, 20]),
    "Heun": ("HeunDiscreteScheduler", {}, [40, 20, 39]),
    "KDPM2": ("KDPM2DiscreteScheduler", {}, [40, 20, 39]),
    "KDPM2 a": ("KDPM2AncestralDiscreteScheduler", {}, [40, 20, 39]),
    "LCM": ("LCMScheduler", {}, [20, 10, 20]),
    "UniPC": ("UniPCMultistepScheduler", {}, [20, 10, 20]),
}


def scheduler(name: str) -> Any:
    kind, config, _ = SCHEDULERS[name]
    return getattr(diffusers, kind)(beta_schedule="scaled_linear", steps_offset=1, **config)
