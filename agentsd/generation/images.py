"""Prompts to images: one or a few at a time, each from its own seed."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils.memory import should_reduce_batch_size
from diffusers import DiffusionPipeline
from numpy.typing import NDArray
from PIL import Image

from ..attributes import replaced_attribute
from ..errors import AgentSDError, GenerationError, OutOfMemoryError, SettingsError
from ..image_settings import ImageSettings, check_steps
from .prompt_encoding import TEXTS, PromptEncoder

Pixels = NDArray[np.floating[Any]]
"""An image as a pipeline's ``output_type="np"`` gives it: ``[H, W, 3]`` in [0, 1]."""

HIDDEN = "the model's safety checker replaced it with a black image"
"""The message for an image with ``nsfw_content_detected``."""


class RawImage(NamedTuple):
    """An image as a pipeline returns it."""

    pixels: Pixels
    """With NaN where the model's numbers overflowed."""
    nsfw_content_detected: bool | None
    """Whether a safety checker replaced it with a black image; ``None`` without a checker."""


def make_batch(
    pipe: DiffusionPipeline,
    batch: Sequence[ImageSettings],
    encode: Callable[[Sequence[ImageSettings]], dict[str, Any]],
    call_kwargs: Mapping[str, Any] | None = None,
) -> list[RawImage]:
    """Make images in one call, each from its own seed.

    The generators are on the CPU, so that all devices agree on the noise.

    Args:
        pipe: A text-to-image or image-to-image pipeline, patched or not.
        batch: What to make; only prompts and seeds may differ.
        encode: A :class:`PromptEncoder` of the pipeline.
        call_kwargs: Further arguments of the call, such as an image to start from.

    Returns:
        The images, in order.

    Raises:
        SettingsError: If the pipeline refuses the settings, they leave no denoising step, or the
            scheduler draws noise that does not depend on the images' seeds.
        OutOfMemoryError: If the batch does not fit.
        GenerationError: If it fails otherwise.
    """
    call_kwargs, seeds = call_kwargs or {}, [s.seed for s in batch]
    check_steps(batch[0].num_inference_steps, call_kwargs.get("strength", 1.0))
    call = batch[0].model_dump(exclude={"seed", *TEXTS})
    if "height" not in inspect.signature(pipe.__call__).parameters:
        call = {k: v for k, v in call.items() if k not in ("height", "width")}
    with _pipeline_errors(pipe), _seeded_noise(pipe, seeds):
        made = pipe(
            **encode(batch),
            **call,
            **call_kwargs,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            output_type="np",
        )
    flags = getattr(made, "nsfw_content_detected", None) or [None] * len(batch)
    return [
        RawImage(pixels, None if flag is None else bool(flag))
        for pixels, flag in zip(made.images, flags, strict=True)
    ]


@contextmanager
def _seeded_noise(pipe: DiffusionPipeline, seeds: Sequence[int]) -> Iterator[None]:
    """Derive the scheduler's noise from the images' seeds, or refuse the scheduler.

    Raises:
        SettingsError: At the first step that draws from PyTorch's global random state, which is
            then restored.
    """
    scheduler = pipe.scheduler
    step, name = scheduler.step, type(scheduler).__name__
    devices = [pipe._execution_device] if pipe._execution_device.type == "cuda" else []

    @wraps(step)  # pipelines look at its parameters
    def watched(*args: Any, **kwargs: Any) -> Any:
        with torch.random.fork_rng(devices):
            before = _global_states(devices)
            result = step(*args, **kwargs)
            is_global = not all(map(torch.equal, before, _global_states(devices)))
        if is_global:
            raise SettingsError(
                f"{name} draws noise from PyTorch's global random state, so seeds do not determine "
                "its images; choose another scheduler"
            )
        return result

    # DPMSolverSDEScheduler takes no generator, but one seed per image.
    takes_seeds = hasattr(scheduler, "noise_sampler_seed")
    with (
        replaced_attribute(scheduler, "step", watched),
        replaced_attribute(scheduler, "noise_sampler_seed", list(seeds))
        if takes_seeds
        else nullcontext(),
    ):
        yield


def _global_states(devices: Sequence[torch.device]) -> list[torch.Tensor]:
    return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]


def to_image(pixels: Pixels) -> Image.Image:
    """Round pixels to 8 bits, as diffusers does.

    Raises:
        GenerationError: If they are not all finite.
    """
    if not np.isfinite(pixels).all():
        raise GenerationError(
            "the model's numbers overflowed, so there is no image; try float32 or bfloat16, or a "
            "schedule with attn_precision: fp32"
        )
    return Image.fromarray((pixels * 255).round().astype(np.uint8))


@contextmanager
def _pipeline_errors(pipe: DiffusionPipeline) -> Iterator[None]:
    """Raise whatever a pipeline raises as an :class:`AgentSDError`."""
    name = type(pipe).__name__
    try:
        yield
    except AgentSDError:
        raise
    except (TypeError, ValueError, IndexError) as error:
        raise SettingsError(f"{name} refused the settings: {error}") from error
    except (RuntimeError, AttributeError, OverflowError, MemoryError) as error:
        # On MPS and the CPU only the text of a RuntimeError says that memory is short.
        memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if memory or should_reduce_batch_size(error):
            raise OutOfMemoryError(
                f"out of memory on {pipe.device}; make a smaller image or use float16 or bfloat16"
            ) from error
        raise GenerationError(f"{name} failed: {error}") from error


class TimedImage(NamedTuple):
    """An image with the time it took."""

    image: Image.Image
    seconds: float
    nsfw_content_detected: bool | None = None
    """As for :class:`RawImage`."""


def make_image(
    pipe: DiffusionPipeline,
    settings: ImageSettings,
    label: str = "",
    call_kwargs: Mapping[str, Any] | None = None,
) -> TimedImage:
    """Make one image.

    Args:
        pipe: A text-to-image or image-to-image pipeline, patched or not.
        settings: What to make.
        label: Shown by the progress bar on stderr.
        call_kwargs: Further arguments of the pipeline's call, such as an image to start from.

    Returns:
        The image and the seconds from prompt to image.

    Raises:
        SettingsError: As :func:`make_batch`.
        GenerationError: If it runs out of memory, fails, or its numbers overflow.
    """
    pipe.set_progress_bar_config(desc=label, leave=False, disable=None)  # None: not into a file
    begun = time.perf_counter()
    (raw,) = make_batch(pipe, [settings], PromptEncoder(pipe), call_kwargs)
    image = to_image(raw.pixels)
    return TimedImage(image, time.perf_counter() - begun, raw.nsfw_content_detected)
