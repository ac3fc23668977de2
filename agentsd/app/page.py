"""The page: how its parts are laid out and connected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gradio as gr

from ..schedule import Schedule
from .api import compare_endpoint
from .catalog import ImageRequest, model_catalog
from .comparison_panel import ComparisonPanel
from .comparisons import Comparisons
from .editor import ScheduleEditor
from .estimates import Estimates
from .events import DEVICE
from .examples import header, prompt_examples
from .explain_tab import ExplainTab
from .image_controls import ImageControls
from .limits import Limits
from .plot_tab import PlotTab
from .prediction import Prediction
from .schedule_library import ScheduleLibrary
from .size_choice import SizeChoice
from .timeline import Timeline
from .viewer_tab import ViewerTab
from .worker import Worker

FILES_LAST = 3 * 3600
"""Seconds after which files that visitors made are deleted."""


def theme() -> gr.themes.Base:
    """The visitor's own fonts, so that none are fetched."""
    return gr.themes.Default(
        primary_hue="emerald",
        font=["ui-sans-serif", "system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )


def build(
    worker: Worker,
    limits: Limits,
    library: ScheduleLibrary | None = None,
    loras: Mapping[str, str] | None = None,
) -> gr.Blocks:
    """Put the page together.

    Args:
        worker: Runs the jobs.
        limits: How much visitors may ask for.
        library: The schedules to choose from; the presets by default.
        loras: Paths of the LoRAs to choose from, by name.
    """
    catalog = model_catalog(worker.pipes, limits, loras)
    library = library or ScheduleLibrary()
    estimates = {name: Estimates(pipe) for name, pipe in worker.pipes.items()}
    timelines = {name: Timeline(pipe) for name, pipe in worker.pipes.items()}

    def draw(schedule: Schedule, model: str, steps: int, height: int, width: int) -> str:
        size = {"height": height, "width": width}
        settings = catalog.settings(model, prompt="-", num_inference_steps=steps, **size)
        return timelines[model].draw(
            schedule, settings.num_inference_steps, settings.height or 0, settings.width or 0
        )

    def request(*values: Any) -> ImageRequest:
        return catalog.request(**dict(zip([*controls.by_setting, "schedule"], values, strict=True)))

    with gr.Blocks(
        title="agentsd", delete_cache=(600, FILES_LAST), analytics_enabled=False
    ) as page:
        comparisons = Comparisons(worker, page.GRADIO_CACHE, estimates)
        gr.HTML(header(list(worker.pipes)))
        sizes = SizeChoice(catalog, estimates)
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                expected = gr.HTML(elem_id="expected", render=False)
                controls = ImageControls(
                    catalog,
                    library,
                    lambda prompt: prompt_examples(prompt, list(worker.pipes)),
                    expected.render,
                    sizes.buttons.render,
                )
            with gr.Column(scale=3, min_width=320):
                panel = ComparisonPanel(comparisons, sizes, library, page.GRADIO_CACHE)
        with gr.Tabs():
            with gr.Tab("Schedule"):
                expected_too = gr.HTML(elem_id="expected-too")
                editor = ScheduleEditor(controls.preset, controls.timeline, draw, library)
            inputs = [*controls.all, editor.yaml]
            with gr.Tab("Explain"):
                ExplainTab(worker, panel.last)
            with gr.Tab("Layers"):
                ViewerTab(worker, panel.last)
            with gr.Tab("X/Y plot"):
                PlotTab(worker, catalog, page.GRADIO_CACHE, inputs, request)
        controls.connect(panel.status)
        sizes.connect(controls, editor.yaml, page)
        prediction = Prediction(catalog, estimates, library)
        lines = [expected, expected_too]
        prediction.connect(controls, editor.yaml, sizes.measured, lines, page)
        panel.connect(controls, inputs, request)
        panel.gallery.connect(catalog, controls, editor, panel.status)
        gr.api(compare_endpoint(comparisons, catalog), api_name="compare", **DEVICE)
    return page
