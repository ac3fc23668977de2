"""The picture of an X/Y plot: its images made, and drawn with their figures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw, ImageFont

from ...generation.comparison import visible_psnr
from ...generation.images import TimedImage
from ..jobs.job import Job, JobStopped
from .xy_plot import Cell, Plot

MAX_SIDE = 4096
"""Pixels of a plot's longer side; images are made smaller to fit."""


class Sheet(NamedTuple):
    """The picture of a plot."""

    image: Image.Image
    made: int
    """Number of cells that have an image; fewer than all if the job was stopped."""


def make(job: Job, pipe: DiffusionPipeline, plot: Plot, prompt: str) -> Sheet:
    """Make the images of a plot and draw them; those made before the job is stopped are kept.

    Raises:
        JobStopped: If the job is stopped before any image is made.
        AgentSDError: As :meth:`Job.make`.
    """
    made: dict[Cell, TimedImage] = {}
    try:
        job.warm_up(pipe)
        for number, cell in enumerate(plot.images, start=1):
            label = f"image {number} of {len(plot.images)}"
            made[cell] = job.make(pipe, *cell, label=label)
    except JobStopped:
        if not made.keys() & set(plot.cells):
            raise
    images = [made[cell].image if cell in made else None for cell in plot.cells]
    captions = [_caption(cell, made) for cell in plot.cells]
    return Sheet(draw(plot, images, captions, prompt), sum(image is not None for image in images))


def _caption(cell: Cell, made: Mapping[Cell, TimedImage]) -> str:
    """The time of an image; of a patched one also its figures against the unpatched one."""
    if cell not in made:
        return "not made"
    one, unpatched = made[cell], made[cell.unpatched]
    if one.nsfw_content_detected:
        return "hidden by the safety checker"
    if cell.schedule is None:
        return f"{one.seconds:.1f} s"
    psnr = visible_psnr(one, unpatched)
    similarity = "the same image" if psnr is None else f"{psnr:.1f} dB"
    return f"{one.seconds:.1f} s · {unpatched.seconds / one.seconds:.1f}× · {similarity}"


def axes_text(plot: Plot) -> str:
    """The axes as JSON, for the file of a plot."""
    return json.dumps({side: {axis[0]: axis[1]} for side, axis in (("x", plot.x), ("y", plot.y))})


def draw(
    plot: Plot, images: list[Image.Image | None], captions: list[str], title: str
) -> Image.Image:
    """Images in rows and columns, with labels.

    Args:
        plot: Whose labels.
        images: Row by row, all of one size; ``None`` leaves a cell empty.
        captions: A line below each image.
        title: A line above them all.
    """
    (x_name, xs), (y_name, ys) = plot.x, plot.y
    width, height = next(image for image in images if image is not None).size
    shrink = min(1.0, MAX_SIDE / max(width * len(xs), height * len(ys)))
    width, height = max(1, int(width * shrink)), max(1, int(height * shrink))
    size = max(12, min(width // 14, 32))
    font = ImageFont.load_default(size)
    labels = [f"{y_name} {value}" for value in ys]
    left = 2 * size + int(max(font.getlength(label) for label in labels))
    top, line, gap = 5 * size, 2 * size, 8
    wide = max(width, *(int(font.getlength(caption)) for caption in captions))
    sheet = Image.new(
        "RGB", (left + len(xs) * (wide + gap), top + len(ys) * (height + line)), "white"
    )
    pen = ImageDraw.Draw(sheet)
    pen.text((size, size), _cut(title, font, sheet.width - 2 * size), fill="black", font=font)
    for column, value in enumerate(xs):
        above = left + column * (wide + gap) + wide / 2, top - size
        pen.text(above, f"{x_name} {value}", fill="black", font=font, anchor="mm")
    for row, label in enumerate(labels):
        beside = left - size, top + row * (height + line) + height / 2
        pen.text(beside, label, fill="black", font=font, anchor="rm")
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        row, column = divmod(number, len(xs))
        middle = left + column * (wide + gap) + wide // 2
        corner = middle - width // 2, top + row * (height + line)
        if image is not None:
            sheet.paste(image.resize((width, height)), corner)
        below = middle, corner[1] + height + line / 2
        pen.text(below, caption, fill="black", font=font, anchor="mm")
    return sheet


def _cut(text: str, font: Any, width: float) -> str:
    text = " ".join(text.split())[:200]
    while len(text) > 1 and font.getlength(text) > width:
        text = text[:-2] + "…"
    return text
