"""The page: how its parts are laid out and connected."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import gradio as gr

from ..schedule import Schedule
from .api import compare_endpoint
from .comparison_panel import ComparisonPanel
from .components.events import DEVICE
from .controls.examples import header, prompt_examples
from .controls.image_controls import RANDOM_SEED, ImageControls, new_seed
from .controls.prediction import Prediction
from .controls.size_choice import SizeChoice
from .editor.editor import ScheduleEditor
from .editor.timeline import Timeline
from .explain.explain_tab import ExplainTab
from .explain.viewer_tab import ViewerTab
from .history.link import follow_settings
from .history.restorer import Restorer
from .jobs.worker import Worker
from .plots.plot_tab import PlotTab
from .requests.catalog import ImageRequest, model_catalog
from .requests.limits import Limits
from .requests.schedule_library import ScheduleLibrary
from .result.comparisons import Comparisons
from .result.saved_files import FILES_LAST
from .tune.tune_tab import TuneTab


def theme() -> gr.themes.Base:
    """The visitor's own fonts, so that none are downloaded, and buttons with readable text."""
    green, red = ("#047857", "#065f46"), ("#b91c1c", "#991b1b")
    buttons = {
        f"button_{kind}_{name}{suffix}": value
        for kind, (usual, hover) in (("primary", green), ("cancel", red))
        for suffix in ("", "_dark")
        for name, value in (
            ("background_fill", usual),
            ("background_fill_hover", hover),
            ("text_color", "white"),
            ("text_color_hover", "white"),
            ("border_color", usual),
        )
    }
    return gr.themes.Default(
        primary_hue="emerald",
        font=["ui-sans-serif", "system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ).set(**buttons)


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
    timelines = {name: Timeline(pipe) for name, pipe in worker.pipes.items()}

    def draw(schedule: Schedule, model: str, steps: int, height: int, width: int) -> str:
        size = {"height": height, "width": width}
        settings = catalog.settings(model, prompt="-", num_inference_steps=steps, **size)
        return timelines[model].draw(
            schedule, settings.num_inference_steps, settings.height or 0, settings.width or 0
        )

    def request(*values: Any) -> ImageRequest:
        given = dict(zip([*controls.by_setting, "schedule"], values, strict=True))
        if given["seed"] in (None, RANDOM_SEED):
            given["seed"] = new_seed()
        return catalog.request(**given)

    with gr.Blocks(
        title="agentsd", delete_cache=(600, FILES_LAST), analytics_enabled=False
    ) as page:
        comparisons = Comparisons(worker, page.GRADIO_CACHE, catalog, library)
        gr.HTML(header(list(worker.pipes)))
        sizes = SizeChoice(worker, catalog)
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
                panel = ComparisonPanel(comparisons, sizes, page.GRADIO_CACHE)
        with gr.Tabs():
            with gr.Tab("Schedule"):
                expected_too = gr.HTML(elem_id="expected-too")
                editor = ScheduleEditor(
                    controls.preset, controls.timeline, controls.message, draw, library
                )
            inputs = [*controls.all, editor.yaml]
            if limits.max_minutes:
                with gr.Tab("Tune"):
                    TuneTab(
                        worker,
                        limits,
                        page.GRADIO_CACHE,
                        inputs[1:],
                        partial(request, "-"),  # the prompt comes first
                        editor,
                        controls.timeline,
                    )
            with gr.Tab("Explain"):
                ExplainTab(worker, panel.last)
            with gr.Tab("Layers"):
                ViewerTab(worker, panel.last)
            with gr.Tab("X/Y plot"):
                PlotTab(worker, catalog, page.GRADIO_CACHE, inputs, request)
        controls.connect(panel.status)
        sizes.connect(controls, editor.yaml, page)
        prediction = Prediction(worker, catalog, library)
        lines = [expected, expected_too]
        prediction.connect(controls, editor.yaml, sizes.measured, lines, page)
        panel.connect(controls, inputs, request)
        restorer = Restorer(catalog, controls, editor, panel.status)
        panel.gallery.connect(page, restorer, panel.show, panel.outputs)
        follow_settings(page, restorer, controls, editor.yaml)
        gr.api(compare_endpoint(comparisons, catalog), api_name="compare", **DEVICE)
    return page
