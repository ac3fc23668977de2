"""The tab that tunes a schedule for the model and the settings of the page."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import gradio as gr

from ...tuning.budget import Budget
from ..components import markup
from ..components.events import QUICK
from ..components.job_buttons import JobButtons, PageJob
from ..controls.examples import example_prompts
from ..editor.editor import ScheduleEditor
from ..jobs.job import Job
from ..jobs.worker import Worker
from ..requests.catalog import ImageRequest
from ..requests.limits import Limits
from .tune_job import Tuned, TuneRequest, checked_prompts, run_tuning

LONGEST = 32 * 1024
"""Characters of all prompts together."""


class TuneTab:
    """The tab's components and what they do.

    Args:
        worker: Runs the jobs.
        limits: How long tuning may take.
        folder: Where schedules and reports are written.
        inputs: The page's controls but the prompt, which say what to tune for.
        request: Reads their values.
        editor: Where the schedule can be put.
        image: The page's controls of model, steps, height and width.
    """

    def __init__(
        self,
        worker: Worker,
        limits: Limits,
        folder: str,
        inputs: list[Any],
        request: Callable[..., ImageRequest],
        editor: ScheduleEditor,
        image: list[Any],
    ) -> None:
        self._worker, self._limits, self._folder = worker, limits, folder
        self._request = request
        gr.Markdown(
            "Finds the fastest schedule that stays within a budget for the model, size, steps, "
            "scheduler and guidance set above, by measuring on this machine. The images that judge "
            "it have other prompts than those it was chosen on."
        )
        with gr.Row():
            budget = gr.Textbox(
                "psnr>=40",
                label="Budget",
                info="psnr>=DB, ssim>=SHARE or lpips<=DISTANCE to the original, for 9 of 10 "
                "images; or speed>=FACTOR.",
                max_length=40,
                elem_id="budget",
            )
            minutes = gr.Number(
                min(5, limits.max_minutes),
                label="Minutes",
                info=f"At most {limits.max_minutes:g}; more finds better schedules.",
                elem_id="minutes",
            )
        lines = gr.Textbox(
            "\n".join(example_prompts(worker.pipes)),
            label="Prompts, one a line",
            info="Two or more, 40 are better, like those that you will use; ten of them (of few "
            "about half) are held out to judge.",
            lines=4,
            max_lines=12,
            max_length=LONGEST,
            elem_id="tuning-prompts",
        )
        with gr.Row():
            begin = gr.Button("Tune", variant="primary", elem_id="tune")
            stop = gr.Button("Stop and keep the best", variant="stop", elem_id="tune-stop")
        self._status = gr.HTML(elem_id="tune-status")
        with gr.Column(visible=False, elem_id="tuned") as self._result:
            self._plot = gr.Image(
                label="Similarity against time, with the chosen schedule",
                show_label=False,
                type="filepath",
                format="png",
                buttons=["fullscreen"],
                interactive=False,
                elem_id="tuned-plot",
            )
            with gr.Row():
                use = gr.Button("Use this schedule", variant="primary", elem_id="use-tuned")
                self._files = [
                    gr.DownloadButton(label, elem_id=name)
                    for label, name in (
                        ("Download the schedule", "tuned-yaml"),
                        ("Download the report", "tuned-report"),
                    )
                ]
        self._schedule = gr.State("")
        buttons = JobButtons(worker, begin, stop, self._status)
        outputs = [self._result, self._plot, *self._files, self._schedule]
        buttons.connect("tune", self._check, [*inputs, budget, minutes, lines], outputs)
        use.click(editor.load, [self._schedule, *image], editor.outputs, **QUICK)

    def _check(self, *values: Any) -> PageJob:
        """The job that tunes.

        Args:
            *values: Of the page's controls, then budget, minutes and prompts.
        """
        *given, budget, minutes, text = values
        self._limits.check_minutes(minutes)
        Budget.parse(budget)
        image = self._request(*given)
        request = TuneRequest(image, budget, checked_prompts(text, image), minutes)
        pipe = self._worker.pipes[image.model]

        def work(job: Job) -> Tuned:
            return run_tuning(job, pipe, request, self._folder)

        def finish(tuned: Tuned) -> dict[Any, Any]:
            files = (tuned.schedule_file, tuned.report_file)
            return {
                self._status: markup.notes(tuned.words),
                self._result: gr.update(visible=True),
                self._plot: tuned.plot_file,
                self._schedule: tuned.schedule,
                **dict(zip(self._files, files, strict=True)),
            }

        follow = partial(self._worker.follow, work, (), seconds=60 * minutes)
        return PageJob(follow, finish)
