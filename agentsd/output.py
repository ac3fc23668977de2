"""What is written of an image: the file, the record of how it was made, the comparison."""

from __future__ import annotations

import json
import os
import re
import tempfile
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from .errors import OutputError

SAMPLERS = {
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


def parameters(image: Image.Image, recorded: dict[str, Any]) -> str:
    """The record in the ``parameters`` convention that Stable Diffusion users' tools read.

    Args:
        image: What was made; its size is told.
        recorded: What :func:`agentsd.generation.record` returned.
    """
    scheduler = recorded["scheduler"]
    fields = {
        "Steps": recorded["num_inference_steps"],
        "Sampler": SAMPLERS.get(scheduler, scheduler.removesuffix("Scheduler")),
        "CFG scale": recorded["guidance_scale"],
        "Seed": recorded["seed"],
        "Size": f"{image.width}x{image.height}",
        "Model": Path(recorded["model"]).name.removesuffix(".safetensors"),
        "Version": f"agentsd {recorded['agentsd']}",
    }
    if recorded["schedule"]:
        phases = recorded["schedule"]["phases"]
        fields["Agent attention"] = ", ".join(phase["method"] for phase in phases)
    lines = [recorded["prompt"]]
    if recorded["negative_prompt"]:
        lines.append(f"Negative prompt: {recorded['negative_prompt']}")
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in fields.items()))
    return "\n".join(lines)


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r"[,:\n]", text) else text


def save_png(image: Image.Image, path: Path, recorded: dict[str, Any] | None = None) -> None:
    """Write an image; with its record, as ``parameters`` and, in JSON, as ``agentsd``.

    Raises:
        OutputError: If the place cannot be written to.
    """
    info = PngInfo()
    if recorded is not None:
        info.add_text("parameters", parameters(image, recorded))
        info.add_text("agentsd", json.dumps(recorded))
    data = BytesIO()
    image.save(data, format="PNG", pnginfo=info)
    write_whole(path, data.getvalue())


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all.

    Raises:
        OutputError: If the place cannot be written to.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


def prepare_folder(folder: Path) -> None:
    """Make a folder and try it, so that a long run does not end at a place it cannot write to.

    Raises:
        OutputError: If files cannot be made in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(f"cannot write into {folder}: {error.strerror or error}") from error


def next_number(folder: Path) -> int:
    """One above the highest number that a PNG of the folder is named by."""
    named = (re.fullmatch(r"(\d{5,})(-\w+)?\.png", path.name) for path in folder.iterdir())
    taken = [int(match[1]) for match in named if match]
    return max(taken, default=-1) + 1


def side_by_side(panels: dict[str, Image.Image]) -> Image.Image:
    """Images of one size in a row, each under its label."""
    gap, images = 8, list(panels.values())
    width, height = images[0].size
    size = max(10, min(width // 18, 36))
    font, bar = ImageFont.load_default(size), 2 * size
    sheet = Image.new("RGB", (len(images) * (width + gap) + gap, height + bar + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (label, image) in enumerate(panels.items()):
        left = gap + i * (width + gap)
        draw.text((left + width / 2, bar / 2), label, fill="black", font=font, anchor="mm")
        sheet.paste(image, (left, bar))
    return sheet
