"""What the chosen schedule is expected to bring, said beside the choice."""

from __future__ import annotations

from html import escape
from typing import Any

import gradio as gr

from ...errors import AgentSDError
from ..components.events import EACH
from ..jobs.worker import Worker
from ..requests.catalog import ModelCatalog
from ..requests.schedule_library import ScheduleLibrary
from ..result.headline import speed
from .asked_image import asked_image, timed_controls
from .image_controls import ImageControls


class Prediction:
    """A line below the choice of a schedule: what is expected of it here, and what was measured.

    Args:
        worker: Knows how long images take.
        catalog: What visitors can ask for.
        library: The schedules.
    """

    def __init__(self, worker: Worker, catalog: ModelCatalog, library: ScheduleLibrary) -> None:
        self._worker, self._catalog, self._library = worker, catalog, library

    def connect(
        self,
        controls: ImageControls,
        yaml: Any,
        measured: Any,
        lines: list[Any],
        page: gr.Blocks,
    ) -> None:
        """Follow the controls.

        Args:
            controls: The page's controls.
            yaml: The schedule.
            measured: State that changes with each finished comparison.
            lines: HTML components that show the line.
            page: The page, whose loading shows it first.
        """
        inputs = timed_controls(controls, yaml)

        def show(*values: Any) -> list[Any]:
            line = self._line(*values)
            return [gr.skip() if line is None else line for _ in lines]

        changes = [control.change for control in [*inputs, measured]]
        gr.on([page.load, *changes], show, inputs, lines, **EACH)

    def _line(self, *values: Any) -> str | None:
        try:
            request, image = asked_image(self._worker, self._catalog, *values)
            ratio = self._worker.estimator.speedup(image)
        except AgentSDError:  # shown by the control that is wrong
            return None
        name = self._library.name_of(request.schedule)
        settings = request.settings
        here = f"{settings.width} × {settings.height}, {settings.num_inference_steps} steps"
        expected = "" if ratio is None else f"<b>~{escape(speed(ratio))}</b> expected at {here}"
        return f'<p class="prediction">{expected}{_measured(self._library, name)}</p>'


def _measured(library: ScheduleLibrary, name: str) -> str:
    measured = library[name].measured if name in library else None
    if measured is None or measured.psnr is None:
        return ""
    return (
        f"<small>Measured: {escape(speed(1 / measured.time))}, {measured.psnr:.0f} dB to the "
        f"unpatched image ({escape(measured.model)}, {escape(measured.scheduler)}, "
        f"{measured.num_inference_steps} steps, guidance {measured.guidance_scale:g}).</small>"
    )
