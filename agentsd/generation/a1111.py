"""Read the ``parameters`` text that AUTOMATIC1111's web UI and others write into their images."""

from __future__ import annotations

import json
import re
from typing import Any

from ..errors import SettingsError
from ..image_settings import ImageSettings
from ..models.schedulers import class_name
from .records import ImageRecord

NEGATIVE = "Negative prompt:"

SETTINGS = {
    "Seed": ("seed", int),
    "Steps": ("num_inference_steps", int),
    "CFG scale": ("guidance_scale", float),
}
"""Settings by field name."""

MAX_TEXT = 64 * 1024
"""Maximum characters of such a text."""


def read_parameters(text: str) -> ImageRecord:
    """Read the settings of an image.

    Args:
        text: The prompt, the negative prompt if there is one, and a last line of fields
            (``Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x512, Model: …``).

    Raises:
        SettingsError: If it has no such line, or a setting is out of range.

    Example:
        >>> record = read_parameters("a fox\\nSteps: 20, Sampler: Euler a, Seed: 7, Size: 512x768")
        >>> record.settings.seed, record.settings.height, record.scheduler
        (7, 768, 'EulerAncestralDiscreteScheduler')
    """
    *lines, last = text[:MAX_TEXT].strip().split("\n")
    pairs = (part.partition(":") for part in _split_at_commas(last))
    fields = {name.strip(): _unquoted(value) for name, colon, value in pairs if colon}
    if "Steps" not in fields:
        raise SettingsError("the image's parameters have no line with Steps")
    prompt, _, negative = "\n".join(lines).partition(NEGATIVE)
    settings: dict[str, Any] = {"prompt": prompt.strip(), "negative_prompt": negative.strip()}
    for field, (name, kind) in SETTINGS.items():
        try:
            settings |= {name: kind(fields[field])} if field in fields else {}
        except ValueError:
            raise SettingsError(f"{field}: is not a number in the image's parameters") from None
    if size := re.fullmatch(r"(\d{1,5})x(\d{1,5})", fields.get("Size", "")):
        settings |= {"width": int(size[1]), "height": int(size[2])}
    sampler = fields.get("Sampler")
    return ImageRecord(
        settings=ImageSettings(**settings),
        model=fields.get("Model", "unknown"),
        scheduler=None if sampler is None else class_name(sampler),
    )


def _split_at_commas(line: str) -> list[str]:
    """Split a line, except within quoted values, in a time that is linear in its length."""
    parts, start, is_quoted, is_escaped, before = [], 0, False, False, ""
    for place, character in enumerate(line):
        if is_escaped:
            is_escaped = False
        elif is_quoted:
            is_escaped, is_quoted = character == "\\", character != '"'
        elif character == ",":
            parts.append(line[start:place])
            start = place + 1
        else:
            is_quoted = character == '"' and before == ":"
        if not character.isspace():
            before = character
    rest = line[start:]
    return parts + (rest.split(",") if is_quoted else [rest])  # a quote that is never closed


def _unquoted(value: str) -> str:
    value = value.strip()
    if value.startswith('"'):
        try:
            return str(json.loads(value))
        except ValueError:
            return value.strip('"')
    return value
