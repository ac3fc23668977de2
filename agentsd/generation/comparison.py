"""The same images with agent attention and without: side by side, timed, their PSNR measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from diffusers import DiffusionPipeline
from PIL import Image

from ..image_settings import ImageSettings, warm_up_settings
from ..schedule import Schedule
from ..similarity import psnr
from .image_files import next_number, prepare_folder, save_image, side_by_side, write_whole
from .images import TimedImage
from .interleaving import interleaved, warm_up, with_schedule
from .records import ImageRecord


def compare(
    pipe: DiffusionPipeline,
    settings: ImageSettings,
    out: Path,
    *,
    schedule: Schedule,
    model: str,
    num_images: int = 1,
    options: Mapping[str, Any] | None = None,
    call_kwargs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Make images unpatched and patched into a folder, numbered after those there, and a summary.

    Both variants are warmed up, which is not timed, and they alternate in going first.

    Args:
        pipe: A text-to-image pipeline.
        settings: Of the first image; the seeds of the others count up from its seed.
        out: Folder, made if missing.
        schedule: What to patch the pipeline with.
        model: What the pipeline was loaded from, for the record.
        num_images: How many images.
        options: As for :meth:`agentsd.generation.records.ImageRecord.of`.
        call_kwargs: Further arguments of the pipeline's call.

    Returns:
        The summary, which is also in ``out/summary.json``: for each image its files, seed, seconds
        and PSNR between the two variants in dB (``None`` for equal images, and for those that a
        safety checker replaced with black ones); medians over the images; the speed-up; the
        number of hidden images as ``nsfw_content_detected``.

    Raises:
        SettingsError: If the pipeline refuses the settings.
        GenerationError: If the pipeline fails.
        OutputError: If the folder cannot be written to. What was made before stays.
    """
    ImageSettings(**settings.model_dump() | {"seed": settings.seed + num_images - 1})
    prepare_folder(out)
    schedules = {"unpatched": None, "agentsd": schedule}
    variants = {name: with_schedule(each) for name, each in schedules.items()}
    short = warm_up_settings(settings, 1 + len(schedule.phases), call_kwargs)
    warm_up(pipe, variants, short, call_kwargs=call_kwargs)
    images: list[dict[str, Any]] = []
    summary: dict[str, Any] = {"model": model, "images": images}
    for index in range(num_images):
        one = settings.model_copy(update={"seed": settings.seed + index})
        label = f"image {index + 1}/{num_images}, {{}}"
        made = dict(interleaved(pipe, variants, one, index, call_kwargs=call_kwargs, label=label))
        records = {
            name: ImageRecord.of(pipe, one, model, each, options)
            for name, each in schedules.items()
        }
        images.append(_save(out, made, records))
        record = ImageRecord.of(pipe, settings, model, schedule, options)
        summary |= _totals(images) | record.to_dict()
        write_whole(out / "summary.json", json.dumps(summary, indent=2).encode())
    return summary


def _save(
    out: Path, made: Mapping[str, TimedImage], records: Mapping[str, ImageRecord]
) -> dict[str, Any]:
    """Write the two images and their comparison; returns what the summary says of them."""
    stem = f"{next_number(out):05d}"
    entry: dict[str, Any] = {"seed": records["agentsd"].settings.seed}
    for name, prefix, suffix in (("agentsd", "", ""), ("unpatched", "unpatched_", "-unpatched")):
        file = f"{stem}{suffix}.png"
        save_image(made[name].image, out / file, records[name])
        entry |= {
            f"{prefix}file": file,
            f"{prefix}seconds": round(made[name].seconds, 3),
            f"{prefix}nsfw_content_detected": made[name].nsfw_content_detected,
        }
    entry["comparison_file"] = f"{stem}-compare.png"
    entry["psnr"] = visible_psnr(made["agentsd"], made["unpatched"])
    save_image(_sheet(made["unpatched"], made["agentsd"]), out / entry["comparison_file"])
    return entry


def _sheet(unpatched: TimedImage, ours: TimedImage) -> Image.Image:
    faster = unpatched.seconds / ours.seconds
    return side_by_side(
        {
            f"unpatched, {unpatched.seconds:.1f} s": unpatched.image,
            f"agentsd, {ours.seconds:.1f} s ({faster:.2f}x as fast)": ours.image,
        }
    )


def visible_psnr(ours: TimedImage, unpatched: TimedImage) -> float | None:
    """PSNR of two images in dB; None if they are equal, or a safety checker hid one of them."""
    if ours.nsfw_content_detected or unpatched.nsfw_content_detected:
        return None
    a, b = np.asarray(ours.image), np.asarray(unpatched.image)
    return None if np.array_equal(a, b) else psnr(a, b)


def _totals(images: list[dict[str, Any]]) -> dict[str, float | None]:
    """Medians over all images, the speed-up, and how many images were hidden."""
    seconds = median(image["seconds"] for image in images)
    unpatched = median(image["unpatched_seconds"] for image in images)
    measured = [image["psnr"] for image in images if image["psnr"] is not None]
    return {
        "seconds": seconds,
        "unpatched_seconds": unpatched,
        "speedup": round(unpatched / seconds, 3),
        "psnr": median(measured) if measured else None,
        "nsfw_content_detected": sum(
            bool(image[f"{prefix}nsfw_content_detected"])
            for image in images
            for prefix in ("", "unpatched_")
        ),
    }
