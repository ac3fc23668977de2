"""X/Y plots: an image for each pair of values of two parameters, all validated beforehand."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from ...errors import SettingsError
from ...image_settings import ImageSettings
from ...methods import METHODS
from ...models.options import PipelineOptions
from ...schedule import Schedule
from ...settings import short_repr
from ..editor.parameters import Parameter, parameters
from ..requests.catalog import OWN_SCHEDULER, ImageRequest, ModelCatalog
from ..requests.schedule_text import CUSTOM

UNPATCHED = "none"
"""Name, among schedules, of the unpatched image."""

MAX_VALUES_TEXT = 500
"""Characters of an axis's values."""

MAX_VALUES = 256
"""Maximum values of an axis that are parsed; more are too many for any plot."""

FIRST_PARAMETER = "stride"
"""The first axis that changes phases; it sets both ``sx`` and ``sy``."""


class Cell(NamedTuple):
    """One image of a plot."""

    settings: ImageSettings
    schedule: Schedule | None
    scheduler: str | None

    @property
    def unpatched(self) -> Cell:
        """The same without a schedule."""
        return self._replace(schedule=None)


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
    if name == CUSTOM:
        return cell
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
    """A validated plot: its axes, and the images row by row."""

    x: tuple[str, list[Any]]
    y: tuple[str, list[Any]]
    cells: list[Cell]

    @property
    def images(self) -> list[Cell]:
        """The images to make, without duplicates, each unpatched one before its patched ones."""
        return list(dict.fromkeys(one for cell in self.cells for one in (cell.unpatched, cell)))


def read_values(name: str, text: Any) -> list[Any]:
    """Read the values of an axis, which are separated by commas; ``0-3`` stands for 0, 1, 2, 3.

    Raises:
        SettingsError: If there is no such axis, or a value has the wrong type.

    Example:
        >>> read_values("ratio", "0.2, 0.4")
        [0.2, 0.4]
        >>> read_values("seed", "1-3, 7")
        [1, 2, 3, 7]
    """
    known = axes()
    if name not in known:
        raise SettingsError(f"axis: must be one of {', '.join(known)} (got {short_repr(name)})")
    axis = known[name]
    if not isinstance(text, str) or len(text) > MAX_VALUES_TEXT:
        raise SettingsError(
            f"{name}: values separated by commas, at most {MAX_VALUES_TEXT} characters"
        )
    values: list[Any] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        try:
            values += _range(part) if axis.type is int else [axis.type(part)]
        except ValueError:
            what = "whole numbers" if axis.type is int else "numbers"
            raise SettingsError(
                f"{name}: must be {what} separated by commas (got {short_repr(part)})"
            ) from None
    if not values:
        raise SettingsError(f"{name}: give values separated by commas, such as {axis.example}")
    return values


def _range(text: str) -> list[int]:
    """The whole numbers of ``first-last``, or of one number; no more than a plot can have."""
    if match := re.fullmatch(r"(\d+)\s*-\s*(\d+)", text):
        first, last = map(int, match.groups())
        return list(range(first, min(last, first + MAX_VALUES) + 1))
    return [int(text)]


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
    plot = Plot((x_name, xs), (y_name, ys), cells)
    if (more := len(plot.images) - most) > 0:
        raise SettingsError(
            f"at most {most} images in a plot (got {len(xs)} × {len(ys)}, with the originals "
            f"to compare with {more} more than that); leave out some values"
        )
    return plot
