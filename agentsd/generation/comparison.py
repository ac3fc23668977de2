"""The same images with agent attention and without: side by side, timed, their likeness told."""

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
from ..patching.patch import patched
from ..schedule import Schedule
from ..similarity import psnr
from .image_files import next_number, prepare_folder, save_image, side_by_side, write_whole
from .images import TimedImage, make_image
from .records import record


def compare(
    pipe: DiffusionPipeline,
    settings: ImageSettings,
    out: Path,
    *,
    schedule: Schedule,
    model: str,
    num_images: int = 1,
    options: Mapping[str, Any] | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Make images both ways into a folder, numbered on from those there, and a summary.

    Both ways are run for a few steps first, which are not counted, and they take turns at going
    first.

    Args:
        pipe: A text-to-image pipeline.
        settings: Of the first image; the others' seeds count up from it.
        out: Folder, made if missing.
        schedule: What to patch the pipeline with.
        model: What the pipeline was loaded from, for the record.
        num_images: How many images.
        options: What was added to the pipeline, for the record.
        inputs: More to call it with.

    Returns:
        The summary, which is also in ``out/summary.json``: per image its files, seed and
        seconds; the median seconds of both ways, the speed-up, and the likeness of the two
        images as PSNR in dB (``None`` for equal ones). An image that a safety checker replaced
        by a black one has no PSNR; ``nsfw_content_detected`` counts these images.

    Raises:
        SettingsError: If the pipeline refuses the settings.
        GenerationError: If the pipeline fails.
        OutputError: If the folder cannot be written to. What was made before stays.
    """
    ImageSettings(**settings.model_dump() | {"seed": settings.seed + num_images - 1})
    prepare_folder(out)
    ways = {"agentsd": schedule, "unpatched": None}
    short = warm_up_settings(settings, 1 + len(schedule.phases), inputs)
    for way, plan in ways.items():
        _make(pipe, short, plan, f"warm-up, {way}", inputs)
    images: list[dict[str, Any]] = []
    summary: dict[str, Any] = {"model": model, "images": images}
    for index in range(num_images):
        one = settings.model_copy(update={"seed": settings.seed + index})
        made = {
            way: _make(pipe, one, ways[way], f"image {index + 1}/{num_images}, {way}", inputs)
            for way in (ways if index % 2 else reversed(ways))
        }
        stem = f"{next_number(out):05d}"
        entry: dict[str, Any] = {"seed": one.seed}
        for way in ways:
            name = f"{stem}.png" if way == "agentsd" else f"{stem}-{way}.png"
            save_image(made[way].image, out / name, record(pipe, one, model, ways[way], options))
            prefix = "" if way == "agentsd" else f"{way}_"
            entry |= {
                f"{prefix}file": name,
                f"{prefix}seconds": round(made[way].seconds, 3),
                f"{prefix}nsfw_content_detected": made[way].nsfw_content_detected,
            }
        entry["comparison_file"] = f"{stem}-compare.png"
        entry["psnr"] = likeness(made["agentsd"], made["unpatched"])
        sheet = _comparison(made["unpatched"], made["agentsd"])
        save_image(sheet, out / entry["comparison_file"])
        images.append(entry)
        summary |= _over_all(images) | record(pipe, settings, model, schedule, options)
        write_whole(out / "summary.json", json.dumps(summary, indent=2).encode())
    return summary


def _make(
    pipe: DiffusionPipeline,
    settings: ImageSettings,
    schedule: Schedule | None,
    label: str,
    inputs: Mapping[str, Any] | None,
) -> TimedImage:
    if schedule is None:
        return make_image(pipe, settings, label, inputs)
    with patched(pipe, schedule):
        return make_image(pipe, settings, label, inputs)


def _comparison(unpatched: TimedImage, ours: TimedImage) -> Image.Image:
    faster = unpatched.seconds / ours.seconds
    return side_by_side(
        {
            f"unpatched, {unpatched.seconds:.1f} s": unpatched.image,
            f"agentsd, {ours.seconds:.1f} s ({faster:.2f}x as fast)": ours.image,
        }
    )


def likeness(ours: TimedImage, unpatched: TimedImage) -> float | None:
    """PSNR of two images in dB; None if they are equal, or a safety checker hid one of them."""
    if ours.nsfw_content_detected or unpatched.nsfw_content_detected:
        return None
    a, b = np.asarray(ours.image), np.asarray(unpatched.image)
    return None if np.array_equal(a, b) else psnr(a, b)


def _over_all(images: list[dict[str, Any]]) -> dict[str, float | None]:
    """The times over all images, speed-up and likeness, and how many images were hidden."""
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
