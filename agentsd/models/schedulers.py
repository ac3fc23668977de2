"""Find schedulers by their common names, and set them on a pipeline."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
from diffusers import DiffusionPipeline

from ..errors import SettingsError
from ..settings import short_repr

COMMON_NAMES = {
    "DDIMScheduler": "DDIM",
    "PNDMScheduler": "PLMS",
    "EulerDiscreteScheduler": "Euler",
    "EulerAncestralDiscreteScheduler": "Euler a",
    "DPMSolverMultistepScheduler": "DPM++ 2M",
    "HeunDiscreteScheduler": "Heun",
    "LMSDiscreteScheduler": "LMS",
    "LCMScheduler": "LCM",
    "UniPCMultistepScheduler": "UniPC",
}
"""Names of diffusers' schedulers in other Stable Diffusion tools."""


def _normalized(name: str) -> str:
    """A scheduler's name in lower case, without blanks, hyphens and underscores."""
    return re.sub(r"[\s_-]", "", name).lower()


SCHEDULERS = {
    _normalized(spelling): name
    for name in dir(diffusers)
    if name.endswith("Scheduler")
    for spelling in (name, name.removesuffix("Scheduler"), COMMON_NAMES.get(name, name))
}
"""Class names of diffusers' schedulers, by each accepted name in the form of ``_normalized``."""


def class_name(name: str) -> str:
    """The class name of a scheduler, in any spelling; an unknown name is returned unchanged."""
    return SCHEDULERS.get(_normalized(name), name)


def common_name(name: str) -> str:
    """A scheduler's name in other tools; otherwise its class name without ``Scheduler``."""
    return COMMON_NAMES.get(name, name.removesuffix("Scheduler"))


def scheduler_for(pipe: DiffusionPipeline, name: str) -> Any:
    """Another scheduler for a pipeline, with the settings of its own scheduler.

    Args:
        pipe: The pipeline, which is not changed.
        name: A class of diffusers, or the name that other tools give it (``Euler a``). PNDM is
            PLMS: without the initial Runge-Kutta steps, which Stable Diffusion never uses.

    Raises:
        SettingsError: If the pipeline cannot use a scheduler of that name (lists those it can), or
            it needs a package that is not installed.
    """
    return _from(pipe.scheduler, name)


def _from(scheduler: Any, name: str) -> Any:
    own, kind = type(scheduler), class_name(name)
    if kind == own.__name__:  # not every scheduler lists itself as compatible
        return own.from_config(scheduler.config)
    known = {kind.__name__: kind for kind in scheduler.compatibles}
    if kind not in known:
        fit = sorted(COMMON_NAMES.get(k, k) for k in known)
        raise SettingsError(
            f"scheduler: no {short_repr(name)} for this model; choose one of {', '.join(fit)}"
        )
    settings = {"skip_prk_steps": True} if kind == "PNDMScheduler" else {}
    try:
        return known[kind].from_config(scheduler.config, **settings)
    except ImportError as error:  # SciPy, torchsde
        raise SettingsError(f"scheduler: {' '.join(str(error).split())}") from error


@contextmanager
def scheduled(pipe: DiffusionPipeline, name: str | None) -> Iterator[None]:
    """Give a pipeline another scheduler until the end of the ``with`` block.

    Args:
        pipe: The pipeline.
        name: As for :func:`scheduler_for`; ``None`` keeps the pipeline's own.

    Raises:
        SettingsError: As :func:`scheduler_for`.
    """
    own = pipe.scheduler
    try:
        if name is not None:
            pipe.scheduler = scheduler_for(pipe, name)
        yield
    finally:
        pipe.scheduler = own


def unet_calls(scheduler: Any, name: str | None, steps: int) -> int:
    """Number of UNet calls in a run; about twice per step with a second-order scheduler.

    Args:
        scheduler: The one that the model came with, which is not changed.
        name: As for :func:`scheduler_for`; ``None`` for that one.
        steps: Of the run.

    Raises:
        SettingsError: As :func:`scheduler_for`.
    """
    used = _from(scheduler, name or type(scheduler).__name__)
    used.set_timesteps(steps)
    return len(used.timesteps)
