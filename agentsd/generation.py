"""Prompts to images: one image at a time, each from its own seed, with a record of how."""

from __future__ import annotations

import json
import math
import re
import time
import unicodedata
import warnings
from pathlib import Path
from statistics import median
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from pydantic import Field, field_validator

from . import __version__
from .errors import AgentSDError, GenerationError, SettingsError
from .output import next_number, prepare_folder, save_png, side_by_side, write_whole
from .patch import patched
from .schedule import Schedule
from .validation import Strict, shown

WHOLE_WORDS = 4096
"""A vocabulary below this size, as the pocket model's, knows a few whole words and no others."""

Side = Annotated[int, Field(ge=64, le=8192)]


class ImageSettings(Strict):
    """All that an image depends on, besides the model and the schedule.

    Args:
        prompt: What to draw; not empty.
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
        if any(unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t" for c in text):
            raise SettingsError("a prompt must not hold control characters or broken Unicode")
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


class Made(NamedTuple):
    """An image with what it took."""

    image: Image.Image
    seconds: float


def make_image(pipe: DiffusionPipeline, settings: ImageSettings, label: str = "") -> Made:
    """Make one image, from a generator of its own on the CPU, so that devices agree on the noise.

    Args:
        pipe: A text-to-image pipeline, patched or not.
        settings: What to make.
        label: Named by the progress bar on stderr.

    Returns:
        The image and the seconds from prompt to image.

    Raises:
        SettingsError: If the pipeline refuses the settings.
        GenerationError: If it runs out of memory, fails, or its numbers do.
    """
    pipe.set_progress_bar_config(desc=label, leave=False, disable=None)  # None: not into a file
    begun = time.perf_counter()
    try:
        with warnings.catch_warnings():
            # What NumPy says where an image of NaN is made 8-bit, and black.
            warnings.filterwarnings("error", "invalid value encountered in cast")
            image = pipe(
                **settings.model_dump(exclude={"seed"}),
                generator=torch.Generator("cpu").manual_seed(settings.seed),
            ).images[0]
    except AgentSDError:
        raise
    except RuntimeWarning as error:
        raise GenerationError(
            "the model's numbers overflowed and no image came of them; try float32 or bfloat16, "
            "or a schedule with attn_precision: fp32"
        ) from error
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise GenerationError(
            f"out of memory on {pipe.device}; make a smaller image or use float16 or bfloat16"
        ) from error
    except (TypeError, ValueError, IndexError) as error:
        raise SettingsError(f"{type(pipe).__name__} refused the settings: {error}") from error
    except (RuntimeError, AttributeError) as error:
        raise GenerationError(f"{type(pipe).__name__} failed: {error}") from error
    return Made(image, time.perf_counter() - begun)


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
    vocabulary = tokenizer.get_vocab()
    if len(vocabulary) < WHOLE_WORDS:
        words = re.findall(r"\w+", prompt.lower())
        unknown = list(dict.fromkeys(w for w in words if f"{w}</w>" not in vocabulary))
        if unknown:
            more = ", …" if len(unknown) > 10 else ""
            found.append(f"the model does not know the words: {', '.join(unknown[:10])}{more}")
    return found


def record(
    pipe: DiffusionPipeline, settings: ImageSettings, model: str, schedule: Schedule | None
) -> dict[str, Any]:
    """All that makes an image, as plain values; ``schedule`` is None for an unpatched one."""
    return {
        **settings.model_dump(),
        "model": model,
        "scheduler": type(pipe.scheduler).__name__,
        "schedule": schedule.to_dict() if schedule else None,
        "device": str(pipe.device),
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "agentsd": __version__,
        "torch": torch.__version__,
    }


def generate(
    pipe: DiffusionPipeline,
    settings: ImageSettings,
    out: Path,
    *,
    schedule: Schedule | None,
    model: str,
    num_images: int = 1,
    compare: bool = False,
) -> dict[str, Any]:
    """Make images into a folder, numbered on from those there, and a summary of the run.

    Args:
        pipe: A text-to-image pipeline.
        settings: Of the first image; the others' seeds count up from it.
        out: Folder, made if missing.
        schedule: What to patch the pipeline with; ``None`` leaves it unpatched.
        model: What the pipeline was loaded from, for the record.
        num_images: How many images.
        compare: Also make each image unpatched, and a picture of both. Both ways are run for a
            few steps first, which are not counted, and they take turns at going first.

    Returns:
        The summary, which is also in ``out/summary.json``: per image its files, seed and
        seconds; with ``compare`` the median seconds of both ways, the speed-up, and the
        likeness of the two images as PSNR in dB.

    Raises:
        SettingsError: If the pipeline refuses the settings, or ``compare`` has no schedule.
        GenerationError: If the pipeline fails.
        OutputError: If the folder cannot be written to. What was made before stays.
    """
    if compare and schedule is None:
        raise SettingsError("to compare, a schedule is needed")
    ImageSettings(**settings.model_dump() | {"seed": settings.seed + num_images - 1})
    prepare_folder(out)
    ways = {"agentsd": schedule, "unpatched": None} if compare else {"agentsd": schedule}
    if compare and schedule is not None:
        steps = min(1 + len(schedule.phases), settings.num_inference_steps)
        short = settings.model_copy(update={"num_inference_steps": steps})
        for way, plan in ways.items():
            _make(pipe, short, plan, f"warm-up, {way}")
    images: list[dict[str, Any]] = []
    summary: dict[str, Any] = {"model": model, "images": images}
    for index in range(num_images):
        one = settings.model_copy(update={"seed": settings.seed + index})
        made = {
            way: _make(pipe, one, ways[way], f"image {index + 1}/{num_images}, {way}")
            for way in (ways if index % 2 else reversed(ways))
        }
        stem = f"{next_number(out):05d}"
        entry: dict[str, Any] = {"seed": one.seed}
        for way in ways:
            name = f"{stem}.png" if way == "agentsd" else f"{stem}-{way}.png"
            save_png(made[way].image, out / name, record(pipe, one, model, ways[way]))
            prefix = "" if way == "agentsd" else f"{way}_"
            entry |= {f"{prefix}file": name, f"{prefix}seconds": round(made[way].seconds, 3)}
        if compare:
            entry["comparison_file"] = f"{stem}-compare.png"
            entry["psnr"] = psnr(made["agentsd"].image, made["unpatched"].image)
            sheet = _comparison(made["unpatched"], made["agentsd"])
            save_png(sheet, out / entry["comparison_file"])
        images.append(entry)
        summary |= _medians(images, compare) | record(pipe, settings, model, schedule)
        write_whole(out / "summary.json", json.dumps(summary, indent=2).encode())
    return summary


def _make(
    pipe: DiffusionPipeline, settings: ImageSettings, schedule: Schedule | None, label: str
) -> Made:
    if schedule is None:
        return make_image(pipe, settings, label)
    with patched(pipe, schedule):
        return make_image(pipe, settings, label)


def _comparison(unpatched: Made, ours: Made) -> Image.Image:
    faster = unpatched.seconds / ours.seconds
    return side_by_side(
        {
            f"unpatched, {unpatched.seconds:.1f} s": unpatched.image,
            f"agentsd, {ours.seconds:.1f} s ({faster:.2f}x as fast)": ours.image,
        }
    )


def psnr(a: Image.Image, b: Image.Image) -> float | None:
    """Peak signal-to-noise ratio of two images of one size, in dB; None if they are equal.

    Example:
        >>> round(psnr(Image.new("L", (8, 8), 100), Image.new("L", (8, 8), 110)), 1)
        28.1
    """
    difference = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    error = float(np.square(difference).mean())
    return 10 * math.log10(255**2 / error) if error else None


def _medians(images: list[dict[str, Any]], compare: bool) -> dict[str, float | None]:
    """The times over all images and, of a comparison, speed-up and likeness."""
    seconds = median(image["seconds"] for image in images)
    if not compare:
        return {"seconds": seconds}
    unpatched = median(image["unpatched_seconds"] for image in images)
    likeness = [image["psnr"] for image in images if image["psnr"] is not None]
    return {
        "seconds": seconds,
        "unpatched_seconds": unpatched,
        "speedup": round(unpatched / seconds, 3),
        "psnr": median(likeness) if likeness else None,
    }
