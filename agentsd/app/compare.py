"""A request made both ways, and how alike the two images are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from diffusers import DiffusionPipeline
from PIL import Image

from ..evaluation.features import Clip, load_clip
from ..evaluation.metrics import clip_score
from ..generation.comparison import likeness
from ..generation.images import TimedImage
from ..generation.records import record
from ..models.schedulers import scheduled
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
    records: tuple[dict[str, Any], dict[str, Any]]
    """What each image's file is to carry."""


def pocket_judge() -> Judge:
    """The CLIP score by the pocket model's own CLIP, which knows the words of that model only."""
    model: Clip = load_clip("pocket")

    def judge(image: Image.Image, prompt: str) -> float:
        return float(clip_score(model([image]), model.embed_texts([prompt])[0])[0])

    return judge


def recorded(pipe: DiffusionPipeline, request: Request, *, patched: bool) -> dict[str, Any]:
    """The record of a request's image, from which its settings can be read back."""
    schedule = request.schedule if patched else None
    with scheduled(pipe, request.scheduler):
        return record(pipe, request.settings, request.model, schedule)


def compare(
    job: Job, pipe: DiffusionPipeline, request: Request, judge: Judge | None = None
) -> Compared:
    """Make the unpatched and the patched image of a request.

    Raises:
        Stopped: If the job is stopped.
        AgentSDError: As :meth:`Job.make`.
    """
    settings, scheduler = request.settings, request.scheduler
    job.warm_up(pipe, settings, request.schedule)
    unpatched = job.make(pipe, settings, None, scheduler, "unpatched")
    ours = job.make(pipe, settings, request.schedule, scheduler, "patched")
    figures: dict[str, Any] = {
        "unpatched_seconds": round(unpatched.seconds, 3),
        "seconds": round(ours.seconds, 3),
        "speedup": round(unpatched.seconds / ours.seconds, 3),
        "psnr": likeness(ours, unpatched),
        "unpatched_nsfw_content_detected": unpatched.nsfw_content_detected,
        "nsfw_content_detected": ours.nsfw_content_detected,
    }
    if judge is not None:
        scores = [judge(made.image, settings.prompt) for made in (unpatched, ours)]
        figures |= dict(zip(("unpatched_clip_score", "clip_score"), scores, strict=True))
    records = tuple(recorded(pipe, request, patched=way) for way in (False, True))
    return Compared(unpatched, ours, figures, (records[0], records[1]))
