"""Make a request's image unpatched and patched, and measure how similar the two are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from diffusers import DiffusionPipeline
from PIL import Image

from ..evaluation.features import Clip, load_clip
from ..evaluation.metrics import clip_score
from ..generation.comparison import visible_psnr
from ..generation.images import TimedImage
from ..generation.records import ImageRecord
from ..generation.turns import in_turns, with_schedule
from ..models.schedulers import scheduled
from ..schedule import Schedule
from .limits import Request
from .worker import Job

Judge = Callable[[Image.Image, str], float]
"""How well an image fits a prompt."""


class Compared(NamedTuple):
    """Two images from one seed, and figures."""

    unpatched: TimedImage
    ours: TimedImage
    figures: dict[str, Any]
    """Seconds of both, their ratio, the PSNR in dB (``None`` for equal images, and where a safety
    checker hid one), whether it hid them and, where there is a judge, the CLIP scores."""
    records: tuple[ImageRecord, ImageRecord]
    """Of the two images, for their files."""


def pocket_judge() -> Judge:
    """The CLIP score by the pocket model's own CLIP, which knows the words of that model only."""
    model: Clip = load_clip("pocket")

    def judge(image: Image.Image, prompt: str) -> float:
        return float(clip_score(model([image]), model.embed_texts([prompt])[0])[0])

    return judge


def compare(
    job: Job, pipe: DiffusionPipeline, request: Request, judge: Judge | None = None
) -> Compared:
    """Make the unpatched and the patched image of a request.

    Raises:
        Stopped: If the job is stopped.
        AgentSDError: As :meth:`Job.make`.
    """
    settings = request.settings
    schedules = {"unpatched": None, "patched": request.schedule}
    variants = {name: with_schedule(schedule) for name, schedule in schedules.items()}
    with scheduled(pipe, request.scheduler):
        job.warm_up(pipe, variants, settings)
        made = dict(in_turns(pipe, variants, settings, make=job.make_shown))
        records = (recorded(pipe, request, None), recorded(pipe, request, request.schedule))
    unpatched, ours = made["unpatched"], made["patched"]
    figures: dict[str, Any] = {
        "unpatched_seconds": round(unpatched.seconds, 3),
        "seconds": round(ours.seconds, 3),
        "speedup": round(unpatched.seconds / ours.seconds, 3),
        "psnr": visible_psnr(ours, unpatched),
        "unpatched_nsfw_content_detected": unpatched.nsfw_content_detected,
        "nsfw_content_detected": ours.nsfw_content_detected,
    }
    if judge is not None:
        scores = [judge(each.image, settings.prompt) for each in (unpatched, ours)]
        figures |= dict(zip(("unpatched_clip_score", "clip_score"), scores, strict=True))
    return Compared(unpatched, ours, figures, records)


def recorded(pipe: DiffusionPipeline, request: Request, schedule: Schedule | None) -> ImageRecord:
    """The record of a request's image, made by a pipeline that has the request's scheduler."""
    return ImageRecord.of(pipe, request.settings, request.model, schedule)
