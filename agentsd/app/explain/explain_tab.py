"""The tab that explains the method in one picture: what a point of the image attends to."""

from __future__ import annotations

from functools import partial
from typing import Any

import gradio as gr

from ...errors import SettingsError
from ..components import markup
from ..components.events import EACH, LATEST, QUICK
from ..components.job_buttons import JobButtons, PageJob
from ..components.page_errors import errors_in
from ..jobs.job import Job
from ..jobs.worker import Worker
from ..requests.catalog import ImageRequest
from ..result.compare import planned
from . import attention_view
from .attention_view import Explained
from .recordings import Recordings

CENTRE = (0.5, 0.5)
"""Where the first drawing looks, as shares of width and height."""


class ExplainTab:
    """The tab's components and what they do.

    Args:
        worker: Runs the jobs.
        last: State that holds the :class:`ImageRequest` of the image made last.
    """

    def __init__(self, worker: Worker, last: Any) -> None:
        self._worker = worker
        self._kept = Recordings[Explained]()
        gr.Markdown(
            "Every place of an image asks others what to become. In the original, it listens to "
            "all of them; with agentsd, to a few. **Click a place to see the ones it listens to.** "
            "The image is made again to record this."
        )
        with gr.Row():
            begin = gr.Button(
                "Explain the last image", variant="primary", interactive=False, elem_id="explain"
            )
            stop = gr.Button("Stop", variant="stop", elem_id="explain-stop")
        self._status = gr.HTML(elem_id="explain-status")
        self._caption = gr.HTML(elem_id="explain-caption")
        self._key, self._place = gr.State(""), gr.State(CENTRE)
        self._step = gr.Slider(1, 2, 1, step=1, precision=0, label="Step", visible=False)
        self._drawing = gr.Image(
            label="What this place listens to",
            format="png",
            buttons=["download", "fullscreen"],
            interactive=False,
            visible=False,
            elem_id="explain-drawing",
        )
        outputs = [self._caption, self._drawing, self._place]
        last.change(lambda image: gr.update(interactive=image is not None), last, begin, **EACH)
        JobButtons(worker, begin, stop, self._status).connect(
            "explain", self._check, [last], [self._key, self._step, *outputs]
        )
        here = errors_in(self._caption)
        state = [self._key, self._step]
        self._drawing.select(here(self._click), state, outputs, **QUICK)
        self._step.input(here(self._show), [*state, self._place], outputs, **LATEST)

    def _click(self, key: str, step: int, clicked: gr.SelectData) -> dict[Any, Any]:
        kept = self._kept.get(key)
        if kept is None:
            return self._show(key, step, CENTRE)
        x, y = clicked.index
        width, height = attention_view.drawing_size(kept.image)
        return self._show(key, step, (x / width, y / height))

    def _show(self, key: str, step: int, place: tuple[float, float]) -> dict[Any, Any]:
        kept = self._kept.get(key)
        if kept is None:
            return {self._caption: markup.note("That recording is no longer here; record again.")}
        seen = min(kept.maps, key=lambda each: abs(each.step - step))
        token = seen.token_at(*place)
        return {
            self._caption: markup.note(attention_view.caption(seen, token)),
            self._drawing: gr.update(
                value=attention_view.draw(kept.image, seen, token), visible=True
            ),
            self._place: place,
        }

    def _check(self, request: ImageRequest | None) -> PageJob:
        if request is None:
            raise SettingsError("generate an image first")
        pipe = self._worker.pipes[request.model]

        def explain(job: Job) -> Explained:
            return attention_view.explain(job, pipe, request)

        image = planned(pipe, request)[0]
        return PageJob(partial(self._worker.follow, explain, [image]), self._open)

    def _open(self, made: Explained) -> dict[Any, Any]:
        """Keep a recording and show its middle step."""
        if not made.maps:
            return {self._status: markup.note("This schedule changes no layer at this size.")}
        key = self._kept.add(made)
        steps = [each.step for each in made.maps]
        middle = steps[len(steps) // 2]
        last = max(steps[-1], steps[0] + 1)
        return self._show(key, middle, CENTRE) | {
            self._status: markup.note("Recorded. Click a place of the image."),
            self._key: key,
            self._step: gr.update(minimum=steps[0], maximum=last, value=middle, visible=True),
        }
