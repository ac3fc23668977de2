"""What is written of an image: the file, the record of how it was made, the comparison."""

from __future__ import annotations

import json
import os
import re
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import IO, Any

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from ..errors import GenerationError, OutputError, SettingsError
from ..models.schedulers import common_name


def parameters(image: Image.Image, recorded: dict[str, Any]) -> str:
    """The record in the ``parameters`` convention that Stable Diffusion users' tools read.

    Args:
        image: What was made; its size is told.
        recorded: What :func:`agentsd.generation.records.record` returned.
    """
    fields = {
        "Steps": recorded["num_inference_steps"],
        "Sampler": common_name(recorded["scheduler"]),
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


FORMATS = ("png", "jpg", "webp")
"""What images can be written as; jpg and webp at a quality of 95."""

_DESCRIPTION, _EXIF, _COMMENT = 0x010E, 0x8769, 0x9286
"""EXIF tags: the description, the camera's part, and in this the comment of the user."""


def encode_image(
    image: Image.Image, recorded: dict[str, Any] | None = None, form: str = "png"
) -> bytes:
    """An image as the bytes of a file; with its record, as ``parameters`` and JSON.

    In PNG they are text chunks, ``parameters`` and ``agentsd``; elsewhere the EXIF comment, where
    Stable Diffusion users' tools look for it, and the EXIF description.

    Args:
        image: What was made.
        recorded: What :func:`agentsd.generation.records.record` returned.
        form: One of :data:`FORMATS`.

    Raises:
        GenerationError: If the format cannot hold the image or its record.
    """
    data = BytesIO()
    if form == "png":
        info = PngInfo()
        if recorded is not None:
            info.add_text("parameters", parameters(image, recorded))
            info.add_text("agentsd", json.dumps(recorded))
        image.save(data, format="PNG", pnginfo=info)
    else:
        exif = Image.Exif()
        if recorded is not None:
            comment = parameters(image, recorded).encode("utf-16-be")
            exif[_EXIF] = {_COMMENT: b"UNICODE\0" + comment}
            exif[_DESCRIPTION] = json.dumps(recorded)
        try:
            image.save(data, format={"jpg": "JPEG", "webp": "WEBP"}[form], quality=95, exif=exif)
        except (OSError, ValueError) as error:  # too large, or with too long a prompt
            raise GenerationError(f"it cannot be written as {form} ({error}); png can") from error
    return data.getvalue()


def read_record(path: Path) -> dict[str, Any]:
    """The record that an image file carries.

    Raises:
        SettingsError: If the file is no image, or none that agentsd made.
    """
    try:
        with Image.open(path) as image:
            text = getattr(image, "text", {}).get("agentsd") or image.getexif().get(_DESCRIPTION)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or "not an image"
        raise SettingsError(f"{path}: cannot be read ({reason})") from None
    try:
        found = json.loads(text or "")
    except (TypeError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or "agentsd" not in found:
        raise SettingsError(f"{path} carries no settings of agentsd; only its own images do")
    return found


def save_image(image: Image.Image, path: Path, recorded: dict[str, Any] | None = None) -> None:
    """Write an image as a PNG, with its record where there is one.

    Raises:
        OutputError: If the place cannot be written to.
    """
    write_whole(path, encode_image(image, recorded))


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all.

    Raises:
        OutputError: If the place cannot be written to.
    """
    with writing(path) as file:
        file.write(data)


@contextmanager
def writing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to that takes its place, whole and on the disk, when the block ends well.

    Raises:
        OutputError: If the place cannot be written to.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PART}")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException as error:
        with suppress(OSError):
            part.unlink()
        if isinstance(error, OSError):
            raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
        raise


PART = ".part"
"""End of the names of files that are not whole yet."""


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
