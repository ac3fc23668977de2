"""Variants of a pipeline in turns, warmed up, so that their times can be compared."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from diffusers import DiffusionPipeline

from ..image_settings import ImageSettings
from ..patching.patch import patched
from ..schedule import Schedule
from .images import TimedImage, make_image

Apply = Callable[[DiffusionPipeline], AbstractContextManager[Any]]
"""Turns a pipeline into a variant until the end of the ``with`` block."""


class Make(Protocol):
    """Makes one image with a pipeline as it is, as :func:`make_image` does."""

    def __call__(
        self,
        pipe: DiffusionPipeline,
        settings: ImageSettings,
        label: str = "",
        call_kwargs: Mapping[str, Any] | None = None,
    ) -> TimedImage: ...


def with_schedule(schedule: Schedule | None) -> Apply:
    """The variant that is patched with a schedule; ``None`` is the unpatched one."""
    return nullcontext if schedule is None else lambda pipe: patched(pipe, schedule)


def warm_up(
    pipe: DiffusionPipeline,
    variants: Mapping[str, Apply],
    settings: ImageSettings,
    *,
    make: Make = make_image,
    call_kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Run each variant once, since its first steps are slower.

    Args:
        pipe: Unpatched.
        variants: By name.
        settings: Of a short run; see :func:`agentsd.image_settings.warm_up_settings`.
        make: Makes an image.
        call_kwargs: Further arguments of the pipeline's call.
    """
    for name, apply in variants.items():
        with apply(pipe), warnings.catch_warnings():
            # That of a short run, which is what this is.
            warnings.filterwarnings("ignore", "this run of .* computes each step in full")
            make(pipe, settings, f"warm-up, {name}", call_kwargs)


def interleaved(
    pipe: DiffusionPipeline,
    variants: Mapping[str, Apply],
    settings: ImageSettings,
    number: int = 0,
    *,
    make: Make = make_image,
    call_kwargs: Mapping[str, Any] | None = None,
    label: str = "{}",
    skip: Container[str] = (),
) -> Iterator[tuple[str, TimedImage]]:
    """Make an image with each variant, one after the other; each image starts with another one.

    Args:
        pipe: Unpatched, and again so at each yield.
        variants: By name.
        settings: Of the image.
        number: Of the image; decides which variant goes first.
        make: Makes an image.
        call_kwargs: Further arguments of the pipeline's call.
        label: Names the image on the progress bar; ``{}`` stands for the variant.
        skip: Variants to leave out.

    Yields:
        The name of each variant and its image.
    """
    names = list(variants)
    first = number % len(names)
    for name in names[first:] + names[:first]:
        if name not in skip:
            with variants[name](pipe):
                made = make(pipe, settings, label.replace("{}", name), call_kwargs)
            yield name, made
