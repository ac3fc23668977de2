"""X/Y plots: one image for each pair of values of two parameters, as one picture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw, ImageFont

from ..errors import SettingsError
from ..image_settings import ImageSettings
from ..methods import METHODS
from ..models.options import PipelineOptions
from ..schedule import Schedule
from ..settings import short_repr
from .catalog import OWN_SCHEDULER, ImageRequest, ModelCatalog
from .parameters import Parameter, parameters
from .worker import Job

UNPATCHED = "none"
"""Name, among schedules, of the unpatched image."""

MAX_VALUES_TEXT = 500
"""Characters of an axis's values."""

MAX_SIDE = 4096
"""Pixels of a plot's longer side; images are made smaller to fit."""

FIRST_PARAMETER = "stride"
"""The first axis that changes phases; it sets both ``sx`` and ``sy``."""


class Cell(NamedTuple):
    """One image of a plot."""

    settings: ImageSettings
    schedule: Schedule | None
    scheduler: str | None


def _setting(name: str) -> Callable[[Cell, Any], Cell]:
    def change(cell: Cell, value: Any) -> Cell:
        return cell._replace(settings=ImageSettings(**cell.settings.model_dump() | {name: value}))

    return change


def _parameter(*names: str) -> Callable[[Cell, Any], Cell]:
    def change(cell: Cell, value: Any) -> Cell:
        if cell.schedule is None:
            return cell
        return cell._replace(schedule=cell.schedule.override(**dict.fromkeys(names, value)))

    return change


def _schedule(cell: Cell, name: str) -> Cell:
    return cell._replace(schedule=None if name == UNPATCHED else Schedule.preset(name))


def _scheduler(cell: Cell, name: str) -> Cell:
    return cell._replace(scheduler=None if name == OWN_SCHEDULER else name)


class Axis(NamedTuple):
    """A parameter that can vary along an axis."""

    type: type
    change: Callable[[Cell, Any], Cell]
    example: str


def axes() -> dict[str, Axis]:
    """The axes by name: settings of the image, then parameters of all methods."""
    known = {
        "schedule": Axis(str, _schedule, "none, faithful, paper"),
        "steps": Axis(int, _setting("num_inference_steps"), "10, 25, 50"),
        "seed": Axis(int, _setting("seed"), "0, 1, 2"),
        "guidance": Axis(float, _setting("guidance_scale"), "1, 2, 5"),
        "scheduler": Axis(str, _scheduler, "DDIM, Euler a, UniPC"),
        FIRST_PARAMETER: Axis(int, _parameter("sx", "sy"), "2, 4, 8"),
    }
    for method in METHODS.values():
        for name, parameter in parameters(method).items():
            if parameter.type is not bool:
                known.setdefault(name, Axis(parameter.type, _parameter(name), _example(parameter)))
    return known


def _example(parameter: Parameter) -> str:
    values = parameter.examples or parameter.choices or [parameter.default]
    return ", ".join(map(str, values))


class Plot(NamedTuple):
    """A plot that was checked: its axes, and the images row by row."""

    x: tuple[str, list[Any]]
    y: tuple[str, list[Any]]
    cells: list[Cell]


def read_values(name: str, text: Any) -> list[Any]:
    """Read the values of an axis, which are separated by commas.

    Raises:
        SettingsError: If there is no such axis, or a value has the wrong type.

    Example:
        >>> read_values("ratio", "0.2, 0.4")
        [0.2, 0.4]
    """
    known = axes()
    if name not in known:
        raise SettingsError(f"axis: must be one of {', '.join(known)} (got {short_repr(name)})")
    axis = known[name]
    if not isinstance(text, str) or len(text) > MAX_VALUES_TEXT:
        raise SettingsError(
            f"{name}: values separated by commas, at most {MAX_VALUES_TEXT} characters"
        )
    values = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        try:
            values.append(axis.type(part))
        except ValueError:
            what = "whole numbers" if axis.type is int else "numbers"
            raise SettingsError(
                f"{name}: must be {what} separated by commas (got {short_repr(part)})"
            ) from None
    if not values:
        raise SettingsError(f"{name}: give values separated by commas, such as {axis.example}")
    return values


def plan(
    catalog: ModelCatalog, request: ImageRequest, x: tuple[str, Any], y: tuple[str, Any]
) -> Plot:
    """Check all images of a plot before any of them is made.

    Args:
        catalog: What visitors can ask for.
        request: What all images have in common.
        x: Name of the horizontal axis, and its values as text.
        y: Name of the vertical axis, and its values as text.

    Raises:
        SettingsError: If an image is not allowed, or there are too many.
        ScheduleError: If a parameter cannot have one of the values.
    """
    (x_name, y_name), (xs, ys) = (x[0], y[0]), (read_values(*x), read_values(*y))
    if x_name == y_name:
        raise SettingsError(f"the axes must be two different ones (got {x_name} twice)")
    most = catalog.limits.max_images
    if len(xs) * len(ys) > most:
        raise SettingsError(f"at most {most} images in a plot (got {len(xs)} × {len(ys)})")
    if request.options != PipelineOptions():
        raise SettingsError("plots are made from text alone; remove the initial image and the LoRA")
    known = axes()
    cells = []
    for y_value in ys:
        for x_value in xs:
            cell = Cell(request.settings, request.schedule, request.scheduler)
            changes = [(x_name, x_value), (y_name, y_value)]
            # Schedules first: parameters then change the schedule that was chosen.
            for name, value in sorted(changes, key=lambda change: change[0] != "schedule"):
                cell = known[name].change(cell, value)
            catalog.limits.check(cell.settings)
            catalog.check_scheduler(request.model, cell.scheduler)
            cells.append(cell)
    return Plot((x_name, xs), (y_name, ys), cells)


def make(job: Job, pipe: DiffusionPipeline, plot: Plot, prompt: str) -> Image.Image:
    """Make the images of a plot and draw them.

    Raises:
        Stopped: If the job is stopped.
        AgentSDError: As :meth:`Job.make`.
    """
    made = [
        job.make(pipe, *cell, label=f"image {number} of {len(plot.cells)}")
        for number, cell in enumerate(plot.cells, start=1)
    ]
    captions = [
        "hidden by the safety checker" if one.nsfw_content_detected else f"{one.seconds:.1f} s"
        for one in made
    ]
    return draw(plot, [one.image for one in made], captions, prompt)


def draw(plot: Plot, images: list[Image.Image], captions: list[str], title: str) -> Image.Image:
    """Images in rows and columns, with labels.

    Args:
        plot: Whose labels.
        images: Row by row, all of one size.
        captions: A line below each image.
        title: A line above them all.
    """
    (x_name, xs), (y_name, ys) = plot.x, plot.y
    width, height = images[0].size
    shrink = min(1.0, MAX_SIDE / max(width * len(xs), height * len(ys)))
    width, height = max(1, int(width * shrink)), max(1, int(height * shrink))
    size = max(12, min(width // 14, 32))
    font = ImageFont.load_default(size)
    labels = [f"{y_name} {value}" for value in ys]
    left = 2 * size + int(max(font.getlength(label) for label in labels))
    top, line, gap = 5 * size, 2 * size, 8
    sheet = Image.new(
        "RGB", (left + len(xs) * (width + gap), top + len(ys) * (height + line)), "white"
    )
    pen = ImageDraw.Draw(sheet)
    pen.text((size, size), _cut(title, font, sheet.width - 2 * size), fill="black", font=font)
    for column, value in enumerate(xs):
        middle = left + column * (width + gap) + width / 2, top - size
        pen.text(middle, f"{x_name} {value}", fill="black", font=font, anchor="mm")
    for row, label in enumerate(labels):
        beside = left - size, top + row * (height + line) + height / 2
        pen.text(beside, label, fill="black", font=font, anchor="rm")
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        row, column = divmod(number, len(xs))
        corner = left + column * (width + gap), top + row * (height + line)
        sheet.paste(image.resize((width, height)), corner)
        below = corner[0] + width / 2, corner[1] + height + line / 2
        pen.text(below, caption, fill="black", font=font, anchor="mm")
    return sheet


def _cut(text: str, font: Any, width: float) -> str:
    text = " ".join(text.split())[:200]
    while len(text) > 1 and font.getlength(text) > width:
        text = text[:-2] + "…"
    return text
