"""The settings of an image: all it depends on besides the model and the schedule."""

from __future__ import annotations

import re
from collections.abc import Mapping
from hashlib import sha256
from typing import Annotated, Any, ClassVar

from pydantic import Field, field_validator

from .errors import SettingsError
from .settings import StrictModel

LONGEST_PROMPT = 10_000
"""Characters; models read far fewer."""

UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
"""Control characters except tab and line feed, and lone surrogates."""

MOST_STEPS = 1000
"""Denoising steps; models are trained with this many."""

SHORTEST_SIDE, LONGEST_SIDE = 64, 8192
"""Of an image, in pixels."""

Side = Annotated[int, Field(ge=SHORTEST_SIDE, le=LONGEST_SIDE)]


class ImageSettings(StrictModel):
    """All that an image depends on, besides the model and the schedule.

    Args:
        prompt: What to draw; not empty, at most 10,000 characters (models read far fewer).
        negative_prompt: What to avoid; used only if ``guidance_scale`` is above 1.
        seed: Seed of the initial noise, in [0, 2**63).
        num_inference_steps: Denoising steps, 1 to 1,000.
        guidance_scale: Weight of the prompt (classifier-free guidance), in [0, 100]; 1 or less
            turns guidance off and halves the work.
        height: In pixels, 64 to 8,192, a multiple of 8; ``None`` is the model's own size.
        width: In pixels, likewise.

    Raises:
        SettingsError: Names the setting, its value and what is allowed.
    """

    error: ClassVar = SettingsError

    prompt: str
    negative_prompt: str = ""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    num_inference_steps: Annotated[int, Field(ge=1, le=MOST_STEPS)] = 25
    guidance_scale: Annotated[float, Field(ge=0, le=100)] = 7.5
    height: Side | None = None
    width: Side | None = None

    @field_validator("prompt", "negative_prompt")
    @classmethod
    def _printable(cls, text: str) -> str:
        if UNPRINTABLE.search(text):
            raise SettingsError("a prompt must not contain control characters or broken Unicode")
        if len(text) > LONGEST_PROMPT:
            raise SettingsError(
                f"a prompt must have at most {LONGEST_PROMPT} characters (got {len(text)})"
            )
        return text

    @field_validator("prompt")
    @classmethod
    def _not_blank(cls, text: str) -> str:
        if not text.strip():
            raise SettingsError("prompt: must not be blank")
        return text

    @field_validator("height", "width")
    @classmethod
    def _multiple_of_8(cls, side: int | None) -> int | None:
        if side is not None and side % 8:
            raise SettingsError(f"height and width must be multiples of 8 (got {side})")
        return side


def is_size(height: Any, width: Any) -> bool:
    """Whether :class:`ImageSettings` takes this height and width, in pixels."""
    try:
        ImageSettings(prompt="-", height=height, width=width)
    except SettingsError:
        return False
    return True


def check_steps(num_inference_steps: int, strength: float) -> None:
    """Refuse an image-to-image run that leaves no denoising step.

    Args:
        num_inference_steps: The number of steps asked for.
        strength: The share of these steps that is run, in (0, 1]; 1 for text to image.

    Raises:
        SettingsError: Names the smallest number of steps.
    """
    if _steps_left(num_inference_steps, strength) < 1:
        least = _steps_for(1, strength)
        more = f"ask for at least {least} steps or " if least <= MOST_STEPS else ""
        raise SettingsError(
            f"num_inference_steps: {num_inference_steps} at strength {strength:g} leaves no "
            f"denoising step; {more}raise strength"
        )


def warm_up_settings(
    settings: ImageSettings, steps: int, call_kwargs: Mapping[str, Any] | None = None
) -> ImageSettings:
    """The settings of a short run of ``steps`` denoising steps, or of all if there are fewer.

    Args:
        settings: Of the full run.
        steps: At least 1.
        call_kwargs: Further arguments of the pipeline's call; with ``strength``, only this share of
            the requested steps is run.
    """
    asked = _steps_for(steps, (call_kwargs or {}).get("strength", 1.0))
    fewer = min(asked, settings.num_inference_steps)
    return settings.model_copy(update={"num_inference_steps": fewer})


def _steps_left(num_inference_steps: int, strength: float) -> int:
    return int(num_inference_steps * strength)  # as diffusers rounds


def _steps_for(steps: int, strength: float) -> int:
    """How many steps to ask for so that ``steps`` are run; at most ``MOST_STEPS`` + 1."""
    asked = range(steps, MOST_STEPS + 1)
    return next((n for n in asked if _steps_left(n, strength) >= steps), MOST_STEPS + 1)


def image_seed(base: int, prompt_index: int, image_index: int) -> int:
    """The seed of an image of a run, derived from its position alone.

    The very first image takes the base seed itself, so that a run of one image starts from the
    noise that any other program draws from this seed.

    Args:
        base: Seed of the run, in [0, 2**63).
        prompt_index: Position of the prompt in its list, from 0.
        image_index: Which of the prompt's images, from 0.

    Returns:
        A seed in [0, 2**32): PyTorch's generator on the CPU reads no more bits than that.

    Example:
        >>> image_seed(7, 0, 0), image_seed(7, 1, 0) == image_seed(7, 0, 1)
        (7, False)
    """
    if prompt_index == image_index == 0:
        return base
    key = f"{base} {prompt_index} {image_index}".encode()
    return int.from_bytes(sha256(key).digest()[:4], "little")
