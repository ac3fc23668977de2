"""The tab that makes X/Y plots."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

import gradio as gr

from ...generation.image_files import encode_image, write_whole
from ...generation.prompt_encoding import warnings_for
from ...generation.records import ImageRecord
from ...models.schedulers import scheduled
from ..components import markup
from ..components.events import on_choice
from ..components.job_buttons import JobButtons, PageJob
from ..jobs.job import Job
from ..jobs.time_estimator import PlannedImage
from ..jobs.worker import Worker
from ..requests.catalog import ImageRequest, ModelCatalog
from ..requests.schedule_text import CUSTOM
from ..result.compare import recorded
from ..result.saved_files import new_folder
from . import plot_sheet, xy_plot


class PlotTab:
    """The tab's components and what they do.

    Args:
        worker: Runs the jobs.
        catalog: What visitors can ask for.
        folder: Where plots are written.
        inputs: The page's controls, which say what all images have in common.
        request: Reads their values.
    """

    def __init__(
        self,
        worker: Worker,
        catalog: ModelCatalog,
        folder: str,
        inputs: list[Any],
        request: Callable[..., ImageRequest],
    ) -> None:
        self._worker, self._catalog, self._folder = worker, catalog, folder
        self._request = request
        gr.Markdown(
            "One image for each pair of values; everything else is as set above. Axes from "
            f"*{xy_plot.FIRST_PARAMETER}* on change every phase that has the parameter; the "
            f"schedule *{CUSTOM}* is the one edited here. Each is compared with the original "
            f"image. At most {catalog.limits.max_images} images, made one after the other."
        )
        with gr.Row():
            axes = [*_axis_controls("X", "schedule"), *_axis_controls("Y", "seed")]
        with gr.Row():
            begin = gr.Button("Plot", variant="primary", elem_id="plot")
            stop = gr.Button("Stop", variant="stop", elem_id="plot-stop")
        self._status = gr.HTML(elem_id="plot-status")
        self._image = gr.Image(
            label="Plot",
            show_label=False,
            type="filepath",
            format="png",
            buttons=["download", "fullscreen"],
            interactive=False,
            elem_id="plot-image",
        )
        buttons = JobButtons(worker, begin, stop, self._status)
        buttons.connect("make_plot", self._check, [*inputs, *axes], [self._image])

    def _check(self, *values: Any) -> PageJob:
        """The job that makes a plot.

        Args:
            *values: Of the page's controls, then name and values of each axis.
        """
        *given, x, x_values, y, y_values = values
        request = self._request(*given)
        plot = xy_plot.plan(self._catalog, request, (x, x_values), (y, y_values))
        pipe, prompt = self._worker.pipes[request.model], request.settings.prompt

        def make(job: Job) -> tuple[plot_sheet.Sheet, ImageRecord]:
            with scheduled(pipe, request.scheduler):
                record = recorded(pipe, request, request.schedule)
            return plot_sheet.make(job, pipe, plot, prompt), record

        def finish(result: tuple[plot_sheet.Sheet, ImageRecord]) -> dict[Any, Any]:
            sheet, record = result
            name = f"agentsd-plot-{plot.x[0]}-{plot.y[0]}-{request.settings.seed}.png"
            file = new_folder(self._folder) / name
            texts = {"agentsd-plot": plot_sheet.axes_text(plot)}
            write_whole(file, encode_image(sheet.image, record, texts=texts))
            total, seed = len(plot.cells), request.settings.seed
            state = "Done" if sheet.made == total else f"Stopped at {sheet.made} of {total} images"
            warnings = chain(*(warnings_for(pipe, cell.settings) for cell in plot.cells))
            notes = [f"{state}. Seed {seed}.", *map(markup.sentence, dict.fromkeys(warnings))]
            return {self._status: markup.note(" ".join(notes)), self._image: str(file)}

        images = [PlannedImage(pipe, *cell) for cell in plot.images]
        return PageJob(partial(self._worker.follow, make, images), finish)


def _axis_controls(label: str, name: str) -> tuple[Any, Any]:
    """The choice of an axis, and its values."""
    axes = xy_plot.axes()
    choice = gr.Dropdown(list(axes), value=name, label=f"{label} axis")
    values = gr.Textbox(
        axes[name].example,
        label=f"{label} values",
        info="Separated by commas; 0-3 stands for 0, 1, 2, 3.",
        max_length=500,
    )

    def show_example(name: str) -> dict[Any, Any]:
        return {values: axes[name].example if name in axes else ""}

    on_choice(choice, show_example, [choice], [values])
    return choice, values
