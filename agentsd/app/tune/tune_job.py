"""Tuning as a job of the page: it shows its progress, can be stopped, and leaves three files."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from diffusers import DiffusionPipeline

from ...errors import GenerationError
from ...models.schedulers import scheduled
from ...tuning.clock import TuningProgress, TuningStopped
from ...tuning.split import split_prompts
from ...tuning.tune import Tuning, tune
from ..jobs.job import Job
from ..requests.catalog import ImageRequest
from ..requests.request_options import with_options
from ..result.saved_files import new_folder

BETWEEN = 0.5
"""Seconds between two reports of the progress."""


class TuneRequest(NamedTuple):
    """What to tune, checked."""

    image: ImageRequest
    """Model, steps, size and all else that the schedule is tuned for; its prompt is not used."""
    budget: str
    prompts: list[str]
    minutes: float


class Tuned(NamedTuple):
    """A finished tuning run."""

    words: list[str]
    """What was found and why, in sentences."""
    schedule: str
    """As YAML."""
    schedule_file: str
    report_file: str
    plot_file: str


def checked_prompts(text: str, image: ImageRequest) -> list[str]:
    """The lines of a text, which can be tuned on.

    Raises:
        SettingsError: If there are too few, or one is not a valid prompt.
    """
    prompts = text.splitlines()
    split_prompts(prompts, image.settings.model_dump(exclude={"prompt"}))
    return prompts


def run_tuning(job: Job, pipe: DiffusionPipeline, request: TuneRequest, folder: str) -> Tuned:
    """Tune, within one denoising step of a stop at the latest.

    Args:
        job: The visitor's job.
        pipe: The model's unpatched pipeline.
        request: What to tune.
        folder: Where to keep the schedule and its report; all else is deleted.

    Raises:
        JobStopped: If it was stopped before it knew any schedule.
        AgentSDError: As :func:`agentsd.tune`.
    """
    image = request.image
    settings = image.settings.model_dump(exclude={"prompt"})

    def check_stop(_: Any, __: int, ___: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if job.stopping:
            raise TuningStopped
        return tensors

    told = -math.inf

    def show(now: TuningProgress) -> None:
        nonlocal told
        if now.seconds < told + BETWEEN:
            return
        told = now.seconds
        best = f" · best so far: {now.best}" if now.best else ""
        job.tell(f"Tuning, {now.stage}{best}", max(0.0, now.limit - now.seconds))

    call_kwargs = image.options.call_kwargs(image.settings.height, image.settings.width)
    with TemporaryDirectory() as work:
        out = Path(work) / "tuned.yaml"
        with with_options(pipe, image.options) as chosen, scheduled(chosen, image.scheduler):
            try:
                found = tune(
                    chosen,
                    request.budget,
                    request.prompts,
                    out=out,
                    minutes=request.minutes,
                    model=image.model,
                    call_kwargs=call_kwargs | {"callback_on_step_end": check_stop},
                    progress=show,
                    cancelled=lambda: job.stopping,
                    **settings,
                )
            except GenerationError:
                job.check()
                raise
        return _kept(found, new_folder(folder))


def _kept(found: Tuning, folder: Path) -> Tuned:
    assert found.yaml is not None
    assert found.page is not None
    files = []
    for file, name in (
        (found.yaml, "tuned.yaml"),
        (found.page, "tuning-report.html"),
        (found.page.with_name("front.png"), "front.png"),
    ):
        files.append(str(shutil.copyfile(file, folder / name)))
    text = found.yaml.read_text(encoding="utf-8")
    return Tuned(found.report["words"], text, *files)
