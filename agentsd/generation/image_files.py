"""Image files that carry their records, written atomically; and images side by side."""

from __future__ import annotations

import json
import os
import re
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import IO

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from ..errors import AgentSDError, GenerationError, OutputError, SettingsError
from ..models.schedulers import common_name
from .records import ImageRecord


def parameters(image: Image.Image, record: ImageRecord) -> str:
    """The record in the ``parameters`` convention that Stable Diffusion tools read.

    Args:
        image: The image, whose size is given.
        record: Of the image.
    """
    settings = record.settings
    fields = {
        "Steps": settings.num_inference_steps,
        "Sampler": common_name(record.scheduler or "unknown"),
        "CFG scale": settings.guidance_scale,
        "Seed": settings.seed,
        "Size": f"{image.width}x{image.height}",
        "Model": Path(record.model).name.removesuffix(".safetensors"),
        "Version": f"agentsd {record.versions.get('agentsd', 'unknown')}",
    }
    if record.schedule:
        fields["Agent attention"] = ", ".join(phase.method for phase in record.schedule.phases)
    lines = [settings.prompt]
    if settings.negative_prompt:
        lines.append(f"Negative prompt: {settings.negative_prompt}")
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in fields.items()))
    return "\n".join(lines)


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r"[,:\n]", text) else text


FORMATS = ("png", "jpg", "webp")
"""Image formats that can be written; jpg and webp with quality 95."""

_DESCRIPTION, _EXIF, _COMMENT = 0x010E, 0x8769, 0x9286
"""EXIF tags: the description, the Exif IFD, and within it the user comment."""


def encode_image(
    image: Image.Image,
    record: ImageRecord | None = None,
    form: str = "png",
    texts: Mapping[str, str] | None = None,
) -> bytes:
    """Encode an image as the bytes of a file, with its record as ``parameters`` and as JSON.

    In PNG they are the text chunks ``parameters`` and ``agentsd``; elsewhere the EXIF comment,
    where Stable Diffusion tools look for it, and the EXIF description.

    Args:
        image: The image.
        record: Of the image; ``None`` writes none.
        form: One of :data:`FORMATS`.
        texts: Further text chunks of a PNG, by name.

    Raises:
        GenerationError: If the format cannot hold the image or its record.
    """
    data = BytesIO()
    if form == "png":
        info = PngInfo()
        if record is not None:
            info.add_text("parameters", parameters(image, record))
            info.add_text("agentsd", json.dumps(record.to_dict()))
        for name, text in (texts or {}).items():
            info.add_text(name, text)
        image.save(data, format="PNG", pnginfo=info)
    else:
        exif = Image.Exif()
        if record is not None:
            comment = parameters(image, record).encode("utf-16-be")
            exif[_EXIF] = {_COMMENT: b"UNICODE\0" + comment}
            exif[_DESCRIPTION] = json.dumps(record.to_dict())
        try:
            image.save(data, format={"jpg": "JPEG", "webp": "WEBP"}[form], quality=95, exif=exif)
        except (OSError, ValueError) as error:  # too large, or with too long a prompt
            raise GenerationError(f"it cannot be written as {form} ({error}); use png") from error
    return data.getvalue()


def read_record(path: Path) -> ImageRecord:
    """Read the record that an image file carries.

    Raises:
        SettingsError: If the file is not an image that agentsd made, or its record is not valid.
    """
    try:
        with Image.open(path) as image:
            text = getattr(image, "text", {}).get("agentsd") or image.getexif().get(_DESCRIPTION)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or "not an image"
        raise SettingsError(f"{path}: cannot be read ({reason})") from None
    try:
        data = json.loads(text or "")
    except (TypeError, ValueError, RecursionError):
        data = None
    if not isinstance(data, dict) or "agentsd" not in data:
        raise SettingsError(f"{path} has no agentsd metadata; use an image saved by agentsd")
    try:
        return ImageRecord.from_dict(data)
    except AgentSDError as error:
        raise SettingsError(f"{path}: the image's settings cannot be used: {error}") from None


def save_image(image: Image.Image, path: Path, record: ImageRecord | None = None) -> None:
    """Write an image as a PNG, with its record where there is one.

    Raises:
        OutputError: If the file cannot be written.
    """
    write_whole(path, encode_image(image, record))


def write_whole(path: Path, data: bytes) -> None:
    """Write a file atomically: it exists in full or not at all.

    Raises:
        OutputError: If the file cannot be written.
    """
    with writing(path) as file:
        file.write(data)


@contextmanager
def writing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to, which replaces ``path`` when the block ends without an error.

    Raises:
        OutputError: If the file cannot be written.
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
"""Suffix of files that are still being written."""


def prepare_folder(folder: Path) -> None:
    """Make a folder and check that it is writable, before a long run rather than after.

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
    """One more than the highest number among the names of the folder's PNGs."""
    named = (re.fullmatch(r"(\d{5,})(-\w+)?\.png", path.name) for path in folder.iterdir())
    taken = [int(match[1]) for match in named if match]
    return max(taken, default=-1) + 1


def side_by_side(panels: dict[str, Image.Image]) -> Image.Image:
    """Images of one size in a row, each below its label."""
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
