"""Prompts to images: a few at a time, each from its own seed, with a record of how."""

from __future__ import annotations

import inspect
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache, wraps
from hashlib import sha256
from typing import Annotated, Any, ClassVar, NamedTuple

import diffusers
import numpy as np
import torch
import transformers
from accelerate.utils.memory import should_reduce_batch_size
from diffusers import DiffusionPipeline, UNet2DConditionModel
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field, field_validator

from . import __version__
from .errors import AgentSDError, GenerationError, OutOfMemoryError, SettingsError
from .schedule import Schedule
from .validation import Strict, shown

WHOLE_WORDS = 4096
"""A vocabulary below this size, as the pocket model's, knows a few whole words and no others."""

LONGEST_PROMPT = 10_000
"""Characters; models read far fewer."""

UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
"""Control characters but tab and line feed, and halves of characters that are not UTF-8."""

MOST_STEPS = 1000
"""Denoising steps; models are trained with as many."""

LONGEST_SIDE = 8192
"""Pixels of an image's height or width."""

Side = Annotated[int, Field(ge=64, le=LONGEST_SIDE)]
Pixels = NDArray[np.floating[Any]]
"""An image as a pipeline's ``output_type="np"`` gives it: ``[H, W, 3]`` in [0, 1]."""

HIDDEN = "the model's safety checker replaced it with a black image"
"""What is said of an image with ``nsfw_content_detected``."""


class ImageSettings(Strict):
    """All that an image depends on, besides the model and the schedule.

    Args:
        prompt: What to draw; not empty, at most 10,000 characters (models read far fewer).
        negative_prompt: What to keep away from; used where ``guidance_scale`` is above 1.
        seed: Seed of the initial noise, in [0, 2**63).
        num_inference_steps: Denoising steps, 1 to 1,000.
        guidance_scale: Weight of the prompt (classifier-free guidance), in [0, 100]; 1 or less
            turns guidance off and halves the work.
        height: In pixels, 64 to 8,192, a multiple of 8; ``None`` is the model's own size.
        width: Likewise.

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
            raise SettingsError("a prompt must not hold control characters or broken Unicode")
        if len(text) > LONGEST_PROMPT:
            raise SettingsError(
                f"a prompt must have at most {LONGEST_PROMPT} characters (got {len(text)})"
            )
        return text

    @field_validator("prompt")
    @classmethod
    def _not_blank(cls, text: str) -> str:
        if not text.strip():
            raise SettingsError("prompt: must say something (got only blanks)")
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
        num_inference_steps: Steps asked for.
        strength: The share of them that is run, in (0, 1]; 1 for text to image.

    Raises:
        SettingsError: Says how many steps there must be at least.
    """
    if _steps_left(num_inference_steps, strength) < 1:
        least = _steps_for(1, strength)
        more = f"ask for at least {least} steps or " if least <= MOST_STEPS else ""
        raise SettingsError(
            f"num_inference_steps: {num_inference_steps} at strength {strength:g} leaves no "
            f"denoising step; {more}raise strength"
        )


def warm_up_settings(
    settings: ImageSettings, steps: int, inputs: Mapping[str, Any] | None = None
) -> ImageSettings:
    """The settings of a short run: ``steps`` denoising steps, or all where there are fewer.

    Args:
        settings: Of the whole run.
        steps: At least 1.
        inputs: As for :func:`make_image`; image to image runs only a part of the steps asked for.
    """
    asked = _steps_for(steps, (inputs or {}).get("strength", 1.0))
    fewer = min(asked, settings.num_inference_steps)
    return settings.model_copy(update={"num_inference_steps": fewer})


def _steps_left(num_inference_steps: int, strength: float) -> int:
    return int(num_inference_steps * strength)  # as diffusers rounds


def _steps_for(steps: int, strength: float) -> int:
    """The fewest steps to ask for of which so many are run; at most one above ``MOST_STEPS``."""
    asked = range(steps, MOST_STEPS + 1)
    return next((n for n in asked if _steps_left(n, strength) >= steps), MOST_STEPS + 1)


def image_seed(base: int, prompt_index: int, image_index: int) -> int:
    """The seed of one image of a run, from its place in the list and nothing else.

    The very first image takes the base seed itself, so that a run of one image draws what any
    other program draws from this seed.

    Args:
        base: Seed of the run, in [0, 2**63).
        prompt_index: Place of the prompt in its list, from 0.
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


class PromptEncoder:
    """Embeds prompts, each once and by itself, so that batch mates cannot matter.

    Args:
        pipe: A text-to-image pipeline. For one without a diffusers UNet, whose embeddings go by
            other names, the pipeline is handed the texts.
        keep: How many prompts' embeddings to keep.
    """

    def __init__(self, pipe: DiffusionPipeline, keep: int = 64) -> None:
        self._pipe = pipe
        self._embeds = isinstance(getattr(pipe, "unet", None), UNet2DConditionModel)
        self._device = pipe._execution_device  # milliseconds each time: it asks every module
        self._encoded = lru_cache(maxsize=keep)(self._encode)

    def __call__(self, batch: Sequence[ImageSettings]) -> dict[str, Any]:
        """What to call the pipeline with for the prompts of a batch."""
        if not self._embeds:
            return {name: [getattr(s, name) for s in batch] for name in _TEXTS}
        parts = [
            self._encoded(
                s.prompt, s.negative_prompt, s.guidance_scale > 1 and _is_guided(self._pipe)
            )
            for s in batch
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _encode(self, prompt: str, negative: str, guided: bool) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            found = self._pipe.encode_prompt(
                prompt=prompt,
                negative_prompt=negative or None,
                device=self._device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=guided,
            )
        # Stable Diffusion has the first two, Stable Diffusion XL all four.
        return {n: value for n, value in zip(_EMBEDS, found, strict=False) if value is not None}


_TEXTS = ("prompt", "negative_prompt")
_EMBEDS = (
    *("prompt_embeds", "negative_prompt_embeds"),
    *("pooled_prompt_embeds", "negative_pooled_prompt_embeds"),
)


class Drawn(NamedTuple):
    """An image as a pipeline gives it."""

    pixels: Pixels
    """With NaN where the model's numbers overflowed."""
    nsfw_content_detected: bool | None
    """Whether a safety checker put a black image in its place; ``None`` without a checker."""


def make_batch(
    pipe: DiffusionPipeline,
    batch: Sequence[ImageSettings],
    encode: Callable[[Sequence[ImageSettings]], dict[str, Any]],
    inputs: Mapping[str, Any] | None = None,
) -> list[Drawn]:
    """Make images in one call, each from its own seed.

    The generators are on the CPU, so that all devices agree on the noise.

    Args:
        pipe: A text-to-image or image-to-image pipeline, patched or not.
        batch: What to make; alike in all but prompts and seeds.
        encode: A :class:`PromptEncoder` of the pipeline.
        inputs: More to call it with: an image to start from, say.

    Returns:
        The images, in order.

    Raises:
        SettingsError: If the pipeline refuses the settings, they leave no denoising step, or the
            scheduler draws noise that does not depend on the images' seeds.
        OutOfMemoryError: If the batch does not fit.
        GenerationError: If it fails otherwise.
    """
    inputs, seeds = inputs or {}, [s.seed for s in batch]
    check_steps(batch[0].num_inference_steps, inputs.get("strength", 1.0))
    call = batch[0].model_dump(exclude={"seed", *_TEXTS})
    if "height" not in inspect.signature(pipe.__call__).parameters:
        call = {k: v for k, v in call.items() if k not in ("height", "width")}
    with _told(pipe), _own_noise(pipe, seeds):
        made = pipe(
            **encode(batch),
            **call,
            **inputs,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            output_type="np",
        )
    flags = getattr(made, "nsfw_content_detected", None) or [None] * len(batch)
    return [
        Drawn(pixels, None if flag is None else bool(flag))
        for pixels, flag in zip(made.images, flags, strict=True)
    ]


@contextmanager
def _own_noise(pipe: DiffusionPipeline, seeds: Sequence[int]) -> Iterator[None]:
    """Have the scheduler's noise come from the images' seeds, and refuse one whose does not.

    Raises:
        SettingsError: At the first step that draws from PyTorch's global random state, which is
            then put back.
    """
    scheduler = pipe.scheduler
    step, name = scheduler.step, type(scheduler).__name__
    devices = [pipe._execution_device] if pipe._execution_device.type == "cuda" else []

    @wraps(step)  # pipelines look at its parameters
    def watched(*args: Any, **kwargs: Any) -> Any:
        with torch.random.fork_rng(devices):
            before = _global_states(devices)
            found = step(*args, **kwargs)
            drawn = not all(map(torch.equal, before, _global_states(devices)))
        if drawn:
            raise SettingsError(
                f"{name} draws noise from PyTorch's global random state, so that seeds do not "
                "determine its images; choose another scheduler"
            )
        return found

    # DPMSolverSDEScheduler takes no generator, but one seed per image.
    takes_seeds = hasattr(scheduler, "noise_sampler_seed")
    with (
        _replaced(scheduler, "step", watched),
        _replaced(scheduler, "noise_sampler_seed", list(seeds)) if takes_seeds else nullcontext(),
    ):
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give an object another attribute until the end of the block."""
    own = {name: vars(owner)[name]} if name in vars(owner) else {}
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name)
        vars(owner).update(own)


def _global_states(devices: Sequence[torch.device]) -> list[torch.Tensor]:
    return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]


def to_image(pixels: Pixels) -> Image.Image:
    """Pixels as diffusers makes them 8-bit.

    Raises:
        GenerationError: If they are not all numbers.
    """
    if not np.isfinite(pixels).all():
        raise GenerationError(
            "the model's numbers overflowed and no image came of them; try float32 or bfloat16, "
            "or a schedule with attn_precision: fp32"
        )
    return Image.fromarray((pixels * 255).round().astype(np.uint8))


@contextmanager
def _told(pipe: DiffusionPipeline) -> Iterator[None]:
    """Tell what a pipeline raises as an error of ours."""
    name = type(pipe).__name__
    try:
        yield
    except AgentSDError:
        raise
    except (TypeError, ValueError, IndexError) as error:
        raise SettingsError(f"{name} refused the settings: {error}") from error
    except (RuntimeError, AttributeError, OverflowError, MemoryError) as error:
        # MPS and the CPU tell of their memory in the words of a RuntimeError alone.
        memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if memory or should_reduce_batch_size(error):
            raise OutOfMemoryError(
                f"out of memory on {pipe.device}; make a smaller image or use float16 or bfloat16"
            ) from error
        raise GenerationError(f"{name} failed: {error}") from error


class Made(NamedTuple):
    """An image with what it took."""

    image: Image.Image
    seconds: float
    nsfw_content_detected: bool | None = None
    """As for :class:`Drawn`."""


def make_image(
    pipe: DiffusionPipeline,
    settings: ImageSettings,
    label: str = "",
    inputs: Mapping[str, Any] | None = None,
) -> Made:
    """Make one image.

    Args:
        pipe: A text-to-image or image-to-image pipeline, patched or not.
        settings: What to make.
        label: Named by the progress bar on stderr.
        inputs: More to call the pipeline with: an image to start from, say.

    Returns:
        The image and the seconds from prompt to image.

    Raises:
        SettingsError: As :func:`make_batch`.
        GenerationError: If it runs out of memory, fails, or its numbers do.
    """
    pipe.set_progress_bar_config(desc=label, leave=False, disable=None)  # None: not into a file
    begun = time.perf_counter()
    (drawn,) = make_batch(pipe, [settings], PromptEncoder(pipe), inputs)
    image = to_image(drawn.pixels)
    return Made(image, time.perf_counter() - begun, drawn.nsfw_content_detected)


def warnings_for(pipe: DiffusionPipeline, settings: ImageSettings) -> list[str]:
    """What a model will miss of its prompts: their ends, words that it never saw, or all."""
    found = _missed(pipe, "prompt", settings.prompt)
    if not settings.negative_prompt:
        return found
    if settings.guidance_scale <= 1:
        scale = f"{settings.guidance_scale:g}"
        return [*found, f"the negative prompt is not used: guidance_scale {scale} is not above 1"]
    if not _is_guided(pipe):
        return [*found, "the negative prompt is not used: the model has its guidance built in"]
    return found + _missed(pipe, "negative prompt", settings.negative_prompt)


def _missed(pipe: DiffusionPipeline, name: str, text: str) -> list[str]:
    # SDXL's refiner has the second tokenizer alone.
    tokenizer = getattr(pipe, "tokenizer", None) or getattr(pipe, "tokenizer_2", None)
    if tokenizer is None:
        return []
    found = []
    limit = tokenizer.model_max_length
    ids = tokenizer(text, truncation=False).input_ids
    if len(ids) > limit:
        lost = tokenizer.decode(ids[limit - 1 : -1])
        found.append(
            f"the {name} is longer than the model's {limit - 2} tokens; lost: {shown(lost)}"
        )
    if len(tokenizer) < WHOLE_WORDS:
        vocabulary = tokenizer.get_vocab()
        words = re.findall(r"\w+", text.lower())
        unknown = list(dict.fromkeys(w for w in words if f"{w}</w>" not in vocabulary))
        if unknown:
            of = "" if name == "prompt" else f" of the {name}"
            more = ", …" if len(unknown) > 10 else ""
            found.append(f"the model does not know the words{of}: {', '.join(unknown[:10])}{more}")
    return found


def _is_guided(pipe: DiffusionPipeline) -> bool:
    """Whether guidance runs the UNet on the negative prompt, rather than tell it the scale."""
    unet = getattr(pipe, "unet", None)
    return getattr(getattr(unet, "config", None), "time_cond_proj_dim", None) is None


def record(
    pipe: DiffusionPipeline,
    settings: ImageSettings,
    model: str,
    schedule: Schedule | None,
    extras: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """All that makes an image, as plain values, and nothing of where and when it was made.

    Args:
        pipe: What made it.
        settings: Its settings.
        model: What the pipeline was loaded from.
        schedule: ``None`` for an unpatched image.
        extras: What was added to the pipeline: the fields of :class:`agentsd.extras.Extras`.
    """
    return {**settings.model_dump(), **made_by(pipe, model, schedule, extras)}


def made_by(
    pipe: DiffusionPipeline,
    model: str,
    schedule: Schedule | None,
    extras: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What of a :func:`record` all images of a pipeline share; who makes many asks once."""
    return {
        "model": model,
        "scheduler": type(pipe.scheduler).__name__,
        "schedule": schedule.to_dict() if schedule else None,
        "schedule_hash": schedule_hash(schedule),
        **(extras or {}),
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
