"""The tab that makes X/Y plots."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from itertools import chain
from typing import Any

import gradio as gr

from ..generation.prompt_encoding import warnings_for
from . import markup, xy_plot
from .catalog import ImageRequest, ModelCatalog
from .events import DEVICE, PRIVATE, QUICK, stop_button
from .history import save_plain
from .page_errors import errors_in
from .worker import Finished, Progress, Worker


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
            f"*{xy_plot.FIRST_PARAMETER}* on change every phase that has the parameter. At most "
            f"{catalog.limits.max_images} images, made one after the other."
        )
        with gr.Row():
            axes = [*_axis_controls("X", "schedule"), *_axis_controls("Y", "seed")]
        with gr.Row():
            begin = gr.Button("Plot", variant="primary", elem_id="plot")
            stop = gr.Button("Stop", variant="stop")
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
        run = begin.click(
            errors_in(self._status)(self.make_plot),
            [*inputs, *axes],
            [self._status, self._image],
            **DEVICE,
            **PRIVATE,
        )
        stop_button(stop, self._status, run)

    async def make_plot(self, *values: Any) -> AsyncIterator[dict[Any, Any]]:
        """Check and make a plot.

        Args:
            *values: Of the page's controls, then name and values of each axis.
        """
        *given, x, x_values, y, y_values = values
        request = self._request(*given)
        plot = xy_plot.plan(self._catalog, request, (x, x_values), (y, y_values))
        pipe, prompt = self._worker.pipes[request.model], request.settings.prompt
        yield {self._status: markup.note("…")}
        async with self._worker.follow(
            lambda job: xy_plot.make(job, pipe, plot, prompt), len(plot.cells)
        ) as events:
            async for event in events:
                if isinstance(event, Progress):
                    yield {self._status: markup.progress(event)}
                elif isinstance(event, Finished):
                    file = save_plain(self._folder, event.result, "agentsd-plot.png")
                    warnings = chain(*(warnings_for(pipe, cell.settings) for cell in plot.cells))
                    text = "; ".join(["Done.", *dict.fromkeys(warnings)])
                    yield {self._status: markup.note(text), self._image: file}
                else:
                    yield {self._status: gr.skip()}


def _axis_controls(label: str, name: str) -> tuple[Any, Any]:
    """The choice of an axis, and its values."""
    axes = xy_plot.axes()
    choice = gr.Dropdown(list(axes), value=name, label=f"{label} axis")
    values = gr.Textbox(
        axes[name].example, label=f"{label} values", info="Separated by commas.", max_length=500
    )
    choice.input(lambda name: axes[name].example if name in axes else "", choice, values, **QUICK)
    return choice, values
