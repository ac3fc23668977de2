"""Schedulers by the names that users know, for a pipeline that has another."""

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
"""Names that Stable Diffusion users' tools know diffusers' schedulers by."""


def _spelled(name: str) -> str:
    """A scheduler's name without what people spell in different ways."""
    return re.sub(r"[\s_-]", "", name).lower()


SCHEDULERS = {
    _spelled(spelling): name
    for name in dir(diffusers)
    if name.endswith("Scheduler")
    for spelling in (name, name.removesuffix("Scheduler"), COMMON_NAMES.get(name, name))
}
"""Class names of diffusers' schedulers, by every spelling that is taken: see ``_spelled``."""


def class_name(name: str) -> str:
    """The class name of a scheduler, in any spelling; an unknown name is returned unchanged."""
    return SCHEDULERS.get(_spelled(name), name)


def common_name(name: str) -> str:
    """What users' tools call a scheduler; its class name without the ending where they agree."""
    return COMMON_NAMES.get(name, name.removesuffix("Scheduler"))


def scheduler_for(pipe: DiffusionPipeline, name: str) -> Any:
    """Another scheduler for a pipeline, of its own scheduler's settings.

    Args:
        pipe: The pipeline, which stays as it is.
        name: A class of diffusers, or the name that other tools give it (``Euler a``). PNDM is
            PLMS: without the Runge-Kutta steps in which Stable Diffusion never begins.

    Raises:
        SettingsError: If there is none of that name for this pipeline (lists those there are), or
            it needs a package that is not installed.
    """
    own, kind = type(pipe.scheduler), class_name(name)
    if kind == own.__name__:  # as it is; not every scheduler counts itself among its compatibles
        return own.from_config(pipe.scheduler.config)
    known = {kind.__name__: kind for kind in pipe.scheduler.compatibles}
    if kind not in known:
        fit = sorted(COMMON_NAMES.get(k, k) for k in known)
        raise SettingsError(
            f"scheduler: no {short_repr(name)} for this model; there are {', '.join(fit)}"
        )
    settings = {"skip_prk_steps": True} if kind == "PNDMScheduler" else {}
    try:
        return known[kind].from_config(pipe.scheduler.config, **settings)
    except ImportError as error:  # SciPy, torchsde
        raise SettingsError(f"scheduler: {' '.join(str(error).split())}") from error


@contextmanager
def scheduled(pipe: DiffusionPipeline, name: str | None) -> Iterator[None]:
    """Give a pipeline another scheduler until the end of the block; ``None`` leaves it its own.

    Args:
        pipe: The pipeline.
        name: As for :func:`scheduler_for`.

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
