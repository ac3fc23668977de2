"""The tab that shows what the layers of a patched image do."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import gradio as gr

from ...errors import SettingsError
from ..components import markup
from ..components.events import EACH, LATEST, on_choice
from ..components.job_buttons import JobButtons, PageJob
from ..components.page_errors import errors_in
from ..jobs.job import Job
from ..jobs.worker import Worker
from ..requests.catalog import ImageRequest
from ..result.compare import planned
from . import viewer
from .recordings import Recordings


class ViewerTab:
    """The tab's components and what they do.

    Args:
        worker: Runs the jobs.
        last: State that holds the :class:`ImageRequest` of the image made last.
    """

    def __init__(self, worker: Worker, last: Any) -> None:
        self._worker = worker
        self._recordings = Recordings[viewer.Recording]()
        gr.Markdown(
            "Which tokens are merged, where the agents or keys are, and which of them each token "
            "attends to most. The image is made again to record this; the times above do not "
            "include it."
        )
        with gr.Row():
            record = gr.Button(
                "Look inside the last image",
                variant="primary",
                interactive=False,
                elem_id="record",
            )
            stop = gr.Button("Stop", variant="stop")
        self._status = gr.HTML(elem_id="viewer-status")
        self._key = gr.State("")
        with gr.Row(visible=False) as self._choices:
            self._layer = gr.Dropdown(
                [], label="Layer", info="In the order of the UNet.", min_width=240
            )
            self._step = gr.Slider(
                1,
                2,
                1,
                step=1,
                precision=0,
                label="Step",
                info="Early steps set large shapes.",
                min_width=240,
            )
            self._view = gr.Radio(
                list(viewer.VIEWS), value=viewer.VIEWS[0], label="Show", elem_id="view"
            )
        self._caption = gr.HTML(elem_id="caption")
        self._drawing = gr.Image(
            label="Inside the layer",
            format="png",
            buttons=["download", "fullscreen"],
            interactive=False,
            visible=False,
            elem_id="drawing",
        )
        controls = [self._layer, self._step, self._view]
        outputs = [self._caption, self._drawing]
        last.change(lambda image: gr.update(interactive=image is not None), last, record, **EACH)
        JobButtons(worker, record, stop, self._status).connect(
            "record", self._check, [last], [self._key, self._choices, *controls, *outputs]
        )
        show = errors_in(self._caption)(self._show)
        on_choice(self._layer, show, [self._key, *controls], outputs)
        for control in (self._step, self._view):
            control.input(show, [self._key, *controls], outputs, **LATEST)

    def _show(self, key: str, layer: str, step: int, view: str) -> dict[Any, Any]:
        recording = self._recordings.get(key)
        if recording is None or view not in viewer.VIEWS:
            return {self._caption: markup.note("That recording is no longer here; record again.")}
        nearest = min(recording.steps, key=lambda recorded: abs(recorded - step))
        snapshot = recording.snapshots.get((nearest, layer))
        if snapshot is None:
            return {self._caption: markup.note("This layer is as in the original at this step.")}
        text = f"Step {nearest}: {viewer.caption(snapshot, view)}"
        drawing = viewer.draw(recording, snapshot, view)
        return {
            self._caption: markup.note(text),
            self._drawing: gr.update(value=drawing, visible=True),
        }

    def _check(self, request: ImageRequest | None) -> PageJob:
        if request is None:
            raise SettingsError("generate an image first")
        pipe = self._worker.pipes[request.model]
        image = planned(pipe, request)[0]

        def record(job: Job) -> viewer.Recording:
            return viewer.record_layers(job, pipe, request)

        return PageJob(partial(self._worker.follow, record, [image]), self._open)

    def _open(self, recording: viewer.Recording) -> dict[Any, Any]:
        """Keep a recording and show its first step."""
        if not recording.snapshots:
            note = "This schedule changes no layer at this size."
            return {self._status: markup.note(note)}
        key = self._recordings.add(recording)
        first, last = recording.steps[0], recording.steps[-1]
        step, layer, view = viewer.first_view(recording)
        return self._show(key, layer, step, view) | {
            self._status: markup.note("Recorded. Choose a layer, a step and a view."),
            self._key: key,
            self._choices: gr.update(visible=True),
            self._layer: gr.update(
                choices=[(layer_label(name), name) for name in recording.layers], value=layer
            ),
            self._step: gr.update(maximum=max(last, first + 1), value=step),
            self._view: view,
        }


def layer_label(name: str) -> str:
    """The name of a layer in plain words.

    Example:
        >>> layer_label("up_blocks.3.attentions.1.transformer_blocks.0.attn1")
        'up block 3, attention 1, transformer block 0'
    """
    words = {"_blocks": " block", "attentions": "attention"}
    text = name.removesuffix(".attn1")
    for long, plain in words.items():
        text = text.replace(long, plain)
    return ", ".join(re.sub(r"\.(\d+)", r" \1", text).split("."))
