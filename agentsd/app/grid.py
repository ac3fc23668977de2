"""X/Y plots: one image for each pair of values of two parameters, as one picture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw, ImageFont

from ..errors import SettingsError
from ..image_settings import ImageSettings
from ..schedule import Schedule
from ..settings import short_repr
from .limits import OWN, ModelCatalog, Request
from .worker import Job

UNPATCHED = "none"
"""Stands, among schedules, for the unpatched image."""

LONGEST = 500
"""Characters of an axis's values."""

MOST_SIDE = 4096
"""Pixels of a plot's longer side; images are made smaller to fit."""


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
    return cell._replace(scheduler=None if name == OWN else name)


class Axis(NamedTuple):
    """A parameter that a plot can go along."""

    kind: type
    change: Callable[[Cell, Any], Cell]
    example: str


AXES: dict[str, Axis] = {
    "schedule": Axis(str, _schedule, "none, faithful, paper"),
    "steps": Axis(int, _setting("num_inference_steps"), "10, 25, 50"),
    "seed": Axis(int, _setting("seed"), "0, 1, 2"),
    "guidance": Axis(float, _setting("guidance_scale"), "1, 2, 5"),
    "scheduler": Axis(str, _scheduler, "DDIM, Euler a, UniPC"),
    "ratio": Axis(float, _parameter("ratio"), "0.2, 0.4, 0.6"),
    "stride": Axis(int, _parameter("sx", "sy"), "2, 4, 8"),
    "agent_ratio": Axis(float, _parameter("agent_ratio"), "0.8, 0.95"),
    "agents": Axis(int, _parameter("agents"), "64, 256"),
    "keys": Axis(int, _parameter("keys"), "64, 256, 1024"),
    "k_scale2": Axis(float, _parameter("k_scale2"), "0.3, 0.5, 1"),
    "k_shortcut": Axis(float, _parameter("k_shortcut"), "0, 0.075, 0.15"),
}
"""By the names that visitors choose from. Those from ``ratio`` on are parameters of phases, and
change every phase whose method reads them; ``stride`` is ``sx`` and ``sy``."""


class Plot(NamedTuple):
    """A plot that is allowed: what to make, row by row."""

    across: tuple[str, list[Any]]
    down: tuple[str, list[Any]]
    cells: list[Cell]


def values_of(name: str, text: Any) -> list[Any]:
    """The values of an axis, told with commas between.

    Raises:
        SettingsError: If there is no such axis, or a value is not of its kind.

    Example:
        >>> values_of("ratio", "0.2, 0.4")
        [0.2, 0.4]
    """
    if name not in AXES:
        raise SettingsError(f"axis: there are {', '.join(AXES)} (got {short_repr(name)})")
    if not isinstance(text, str) or len(text) > LONGEST:
        raise SettingsError(f"{name}: values with commas between, at most {LONGEST} characters")
    values = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        try:
            values.append(AXES[name].kind(part))
        except ValueError:
            kind = "whole numbers" if AXES[name].kind is int else "numbers"
            raise SettingsError(
                f"{name}: {kind} with commas between (got {short_repr(part)})"
            ) from None
    if not values:
        raise SettingsError(f"{name}: give values with commas between, as {AXES[name].example}")
    return values


def plan(
    catalog: ModelCatalog, request: Request, across: tuple[str, Any], down: tuple[str, Any]
) -> Plot:
    """Check a plot as a whole before any of it is made.

    Args:
        catalog: What may be asked for.
        request: What is the same for all images.
        across: Name of the horizontal axis, and text of its values.
        down: Of the vertical one, likewise.

    Raises:
        SettingsError: If one image is not allowed, or there are too many.
        ScheduleError: If a value is none of its parameter.
    """
    (x, y), (xs, ys) = (across[0], down[0]), (values_of(*across), values_of(*down))
    if x == y:
        raise SettingsError(f"the axes must be two different ones (got {x} twice)")
    most = catalog.limits.max_images
    if len(xs) * len(ys) > most:
        raise SettingsError(f"at most {most} images in a plot (got {len(xs)} × {len(ys)})")
    cells = []
    # Schedules first: parameters then change what was chosen.
    order = sorted((0, 1), key=lambda i: (x, y)[i] != "schedule")
    for vertical in ys:
        for horizontal in xs:
            cell = Cell(request.settings, request.schedule, request.scheduler)
            for i in order:
                cell = AXES[(x, y)[i]].change(cell, (horizontal, vertical)[i])
            catalog.limits.check(cell.settings)
            catalog.check_scheduler(request.model, cell.scheduler)
            cells.append(cell)
    return Plot((x, xs), (y, ys), cells)


def make(job: Job, pipe: DiffusionPipeline, plot: Plot, prompt: str) -> Image.Image:
    """Make the images of a plot, and the picture of them.

    Raises:
        Stopped: If the job is stopped.
        AgentSDError: As :meth:`Job.make`.
    """
    made = [
        job.make(pipe, *cell, label=f"image {number} of {len(plot.cells)}")
        for number, cell in enumerate(plot.cells, start=1)
    ]
    told = [
        "hidden by the safety checker" if one.nsfw_content_detected else f"{one.seconds:.1f} s"
        for one in made
    ]
    return draw(plot, [one.image for one in made], told, prompt)


def draw(plot: Plot, images: list[Image.Image], told: list[str], title: str) -> Image.Image:
    """Images in rows and columns, with labels.

    Args:
        plot: Whose labels.
        images: Row by row, of one size.
        told: A line under each image.
        title: Above all.
    """
    (x, xs), (y, ys) = plot.across, plot.down
    width, height = images[0].size
    shrink = min(1.0, MOST_SIDE / max(width * len(xs), height * len(ys)))
    width, height = max(1, int(width * shrink)), max(1, int(height * shrink))
    size = max(12, min(width // 14, 32))
    font = ImageFont.load_default(size)
    names = [f"{y} {value}" for value in ys]
    left = 2 * size + int(max(font.getlength(name) for name in names))
    top, line, gap = 5 * size, 2 * size, 8
    sheet = Image.new(
        "RGB", (left + len(xs) * (width + gap), top + len(ys) * (height + line)), "white"
    )
    pen = ImageDraw.Draw(sheet)
    pen.text((size, size), _cut(title, font, sheet.width - 2 * size), fill="black", font=font)
    for column, value in enumerate(xs):
        middle = left + column * (width + gap) + width / 2, top - size
        pen.text(middle, f"{x} {value}", fill="black", font=font, anchor="mm")
    for row, name in enumerate(names):
        beside = left - size, top + row * (height + line) + height / 2
        pen.text(beside, name, fill="black", font=font, anchor="rm")
    for number, (image, text) in enumerate(zip(images, told, strict=True)):
        row, column = divmod(number, len(xs))
        corner = left + column * (width + gap), top + row * (height + line)
        sheet.paste(image.resize((width, height)), corner)
        below = corner[0] + width / 2, corner[1] + height + line / 2
        pen.text(below, text, fill="black", font=font, anchor="mm")
    return sheet


def _cut(text: str, font: Any, width: float) -> str:
    text = " ".join(text.split())[:200]
    while len(text) > 1 and font.getlength(text) > width:
        text = text[:-2] + "…"
    return text
