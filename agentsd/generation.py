"""Prompts to images: a few at a time, each from its own seed, with a record of how."""

from __future__ import annotations

import inspect
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
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

Side = Annotated[int, Field(ge=64, le=8192)]
Pixels = NDArray[np.floating[Any]]
"""An image as a pipeline's ``output_type="np"`` gives it: ``[H, W, 3]`` in [0, 1]."""


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
    num_inference_steps: Annotated[int, Field(ge=1, le=1000)] = 25
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
        conditional = self._pipe.unet.config.time_cond_proj_dim is None
        parts = [
            self._encoded(s.prompt, s.negative_prompt, s.guidance_scale > 1 and conditional)
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


def make_batch(
    pipe: DiffusionPipeline,
    batch: Sequence[ImageSettings],
    encode: Callable[[Sequence[ImageSettings]], dict[str, Any]],
    inputs: Mapping[str, Any] | None = None,
) -> list[Pixels]:
    """Make images in one call, each from a generator of its own.

    The generators are on the CPU, so that all devices agree on the noise.

    Args:
        pipe: A text-to-image or image-to-image pipeline, patched or not.
        batch: What to make; alike in all but prompts and seeds.
        encode: A :class:`PromptEncoder` of the pipeline.
        inputs: More to call it with: an image to start from, say.

    Returns:
        Per image ``[H, W, 3]`` in [0, 1], or with NaN where the model's numbers overflowed.

    Raises:
        SettingsError: If the pipeline refuses the settings.
        OutOfMemoryError: If the batch does not fit.
        GenerationError: If it fails otherwise.
    """
    call = batch[0].model_dump(exclude={"seed", *_TEXTS})
    if "height" not in inspect.signature(pipe.__call__).parameters:
        call = {k: v for k, v in call.items() if k not in ("height", "width")}
    with _told(pipe):
        images = pipe(
            **encode(batch),
            **call,
            **(inputs or {}),
            generator=[torch.Generator("cpu").manual_seed(s.seed) for s in batch],
            output_type="np",
        ).images
    return list(images)


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
        SettingsError: If the pipeline refuses the settings.
        GenerationError: If it runs out of memory, fails, or its numbers do.
    """
    pipe.set_progress_bar_config(desc=label, leave=False, disable=None)  # None: not into a file
    begun = time.perf_counter()
    (pixels,) = make_batch(pipe, [settings], PromptEncoder(pipe), inputs)
    return Made(to_image(pixels), time.perf_counter() - begun)


def warnings_for(pipe: DiffusionPipeline, prompt: str) -> list[str]:
    """What a model will miss of a prompt: its end, or words that it never saw."""
    tokenizer = getattr(pipe, "tokenizer", None)
    if tokenizer is None:
        return []
    found = []
    limit = tokenizer.model_max_length
    ids = tokenizer(prompt, truncation=False).input_ids
    if len(ids) > limit:
        lost = tokenizer.decode(ids[limit - 1 : -1])
        found.append(
            f"the prompt is longer than the model's {limit - 2} tokens; lost: {shown(lost)}"
        )
    if len(tokenizer) < WHOLE_WORDS:
        vocabulary = tokenizer.get_vocab()
        words = re.findall(r"\w+", prompt.lower())
        unknown = list(dict.fromkeys(w for w in words if f"{w}</w>" not in vocabulary))
        if unknown:
            more = ", …" if len(unknown) > 10 else ""
            found.append(f"the model does not know the words: {', '.join(unknown[:10])}{more}")
    return found


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
