"""Sizes as buttons, with what each is expected to take, and the chart of time against size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from ...errors import AgentSDError
from ..components.events import EACH, LATEST, QUICK
from ..jobs.worker import Worker
from ..requests.catalog import ImageRequest, ModelCatalog
from ..result.comparisons import SavedComparison
from ..result.size_chart import Measured, draw, size_label
from ..result.sizes import SizeEstimate, offered_sizes, size_estimates
from .asked_image import asked_image, timed_controls
from .image_controls import ImageControls

MAX_MEASURED = 64
"""Points of the chart; the oldest go first."""


class SizeChoice:
    """The buttons, the chart, and how they follow the other controls.

    Args:
        worker: Knows how long images take.
        catalog: What visitors can ask for.
    """

    def __init__(self, worker: Worker, catalog: ModelCatalog) -> None:
        self._worker, self._catalog = worker, catalog
        model, (height, width) = next(iter(catalog.sizes.items()))
        self.buttons = gr.Radio(
            [_plain(*size) for size in self._sizes(model)],
            value=_value(height, width),
            label="Size",
            info="Larger images gain more. ~ marks an estimate.",
            elem_id="sizes",
            render=False,
        )
        self.measured = gr.State([])
        """The visitor's :class:`Measured` comparisons."""

    def add_chart(self) -> None:
        """Place the chart, which belongs beside the result."""
        self.chart = gr.HTML(draw([], []), elem_id="chart")

    def connect(self, controls: ImageControls, yaml: Any, page: gr.Blocks) -> None:
        """Follow the other controls, and set height and width.

        Args:
            controls: The page's controls.
            yaml: The schedule.
            page: The page, whose loading shows the estimates.
        """
        inputs = [self.measured, *timed_controls(controls, yaml)]
        model, *size = (controls.by_setting[name] for name in ("model", "height", "width"))
        self.buttons.input(self._choose, self.buttons, size, **QUICK)
        for control in size:
            control.change(self._match, [model, *size], self.buttons, **EACH)
        outputs = [self.buttons, self.chart]
        changes = [control.change for control in inputs]
        gr.on([page.load, *changes], self._show, inputs, outputs, **LATEST)

    def add(self, made: Sequence[SavedComparison], measured: Sequence[Measured]) -> dict[Any, Any]:
        """Updates by component that add finished comparisons to the chart."""
        new = [_measured(one) for one in made if one.request.options.init_image is None]
        return {self.measured: [*measured, *new][-MAX_MEASURED:]}

    def _sizes(self, model: str) -> list[tuple[int, int]]:
        return offered_sizes(*self._catalog.sizes[model], self._catalog.limits.max_pixels)

    def _choose(self, size: str | None) -> list[Any]:
        if not size:
            return [gr.skip(), gr.skip()]
        width, height = map(int, size.split("x"))
        return [height, width]

    def _match(self, model: str, height: int, width: int) -> Any:
        """Show the size that is set; none of the buttons for another one."""
        sizes = [_value(*size) for size in self._sizes(model)]
        size = _value(height, width)
        return gr.update(value=size if size in sizes else None)

    def _show(self, measured: list[Measured], *values: Any) -> list[Any]:
        try:
            request, image = asked_image(self._worker, self._catalog, *values)
            found = size_estimates(self._worker.estimator, image, self._sizes(request.model))
        except AgentSDError:  # shown by the control that is wrong
            return [gr.skip(), gr.skip()]
        choices = [(size_label(each), _value(each.height, each.width)) for each in found]
        key = request.model, _kind(request), request.settings.num_inference_steps
        same = [m for m in measured if (m.model, m.schedule, m.steps) == key]
        return [gr.update(choices=choices), draw(found, same)]


def _measured(made: SavedComparison) -> Measured:
    settings, figures = made.request.settings, made.figures
    return Measured(
        made.request.model,
        settings.height or 0,
        settings.width or 0,
        _kind(made.request),
        settings.num_inference_steps,
        figures["unpatched_seconds"],
        figures["seconds"],
    )


def _kind(request: ImageRequest) -> str:
    """What the time of a step depends on besides model and size."""
    guided = request.settings.guidance_scale > 1
    return f"{request.schedule.to_dict()} {guided}"


def _value(height: int, width: int) -> str:
    return f"{width}x{height}"


def _plain(height: int, width: int) -> tuple[str, str]:
    return size_label(SizeEstimate(height, width, None, None, None)), _value(height, width)
