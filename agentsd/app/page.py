"""The page: how its parts are laid out and connected."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ..schedule import Schedule
from .api import compare_endpoint
from .catalog import ImageRequest, model_catalog
from .comparison_panel import ComparisonPanel
from .comparisons import Comparisons
from .editor import ScheduleEditor
from .events import DEVICE
from .history import FILES_LAST
from .image_controls import RANDOM_SEED, ImageControls, new_seed
from .limits import Limits
from .link import follow_settings
from .plot_tab import PlotTab
from .restorer import Restorer
from .timeline import Timeline
from .viewer_tab import ViewerTab
from .worker import Worker


def theme() -> gr.themes.Base:
    """The visitor's own fonts, so that none are fetched, and buttons whose text can be read."""
    orange, red = ("#c2410c", "#9a3412"), ("#b91c1c", "#991b1b")
    buttons = {
        f"button_{kind}_{name}{suffix}": value
        for kind, (usual, hover) in (("primary", orange), ("cancel", red))
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
        font=["ui-sans-serif", "system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    ).set(**buttons)


def build(worker: Worker, limits: Limits) -> gr.Blocks:
    """Put the page together.

    Args:
        worker: Runs the jobs.
        limits: How much visitors may ask for.
    """
    catalog = model_catalog(worker.pipes, limits)
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
        comparisons = Comparisons(worker, page.GRADIO_CACHE)
        gr.Markdown(
            "# agentsd\nTwo images from the same prompt and seed: one by Stable Diffusion as it "
            "is, one with faster self-attention. Nothing is trained. Drag the divider to compare."
        )
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                controls = ImageControls(catalog)
            with gr.Column(scale=3, min_width=320):
                panel = ComparisonPanel(comparisons)
        with gr.Tabs():
            with gr.Tab("Schedule"):
                editor = ScheduleEditor(controls.preset, controls.timeline, controls.message, draw)
            inputs = [*controls.all, editor.yaml]
            with gr.Tab("Layers"):
                ViewerTab(worker, panel.last)
            with gr.Tab("X/Y plot"):
                PlotTab(worker, catalog, page.GRADIO_CACHE, inputs, request)
        controls.connect(panel.status)
        panel.connect(controls, inputs, request)
        restorer = Restorer(catalog, controls, editor, panel.status)
        panel.gallery.connect(page, restorer, panel.show, panel.outputs)
        follow_settings(page, restorer, controls, editor.yaml)
        gr.api(compare_endpoint(comparisons, catalog), api_name="compare", **DEVICE)
    return page
