"""Make the unpatched and the patched image of a request, and compare them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from diffusers import DiffusionPipeline
from PIL import Image

from ..evaluation.features import Clip, clip
from ..evaluation.metrics import clip_score
from ..generation.comparison import likeness
from ..generation.images import TimedImage
from ..generation.records import record
from ..models.schedulers import scheduled
from .catalog import ImageRequest
from .worker import Job

ClipScorer = Callable[[Image.Image, str], float]
"""The CLIP score of an image and a prompt."""


class Compared(NamedTuple):
    """Two images from one seed, and their figures."""

    unpatched: TimedImage
    ours: TimedImage
    figures: dict[str, Any]
    """Seconds of both, their ratio, the PSNR in dB (``None`` for equal images, or if a safety
    checker hid one), whether it hid them and, if there is a scorer, the CLIP scores."""
    records: tuple[dict[str, Any], dict[str, Any]]
    """The record of each image, which its file carries."""


def pocket_clip_scorer() -> ClipScorer:
    """A scorer by the pocket model's own CLIP, which knows only the words of that model."""
    model: Clip = clip("pocket")

    def score(image: Image.Image, prompt: str) -> float:
        return float(clip_score(model([image]), model.texts([prompt])[0])[0])

    return score


def recorded(pipe: DiffusionPipeline, request: ImageRequest, *, patched: bool) -> dict[str, Any]:
    """The record of a request's image, from which its settings can be restored."""
    schedule = request.schedule if patched else None
    with scheduled(pipe, request.scheduler):
        return record(pipe, request.settings, request.model, schedule)


def compare(
    job: Job, pipe: DiffusionPipeline, request: ImageRequest, scorer: ClipScorer | None = None
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
    if scorer is not None:
        scores = [scorer(made.image, settings.prompt) for made in (unpatched, ours)]
        figures |= dict(zip(("unpatched_clip_score", "clip_score"), scores, strict=True))
    records = tuple(recorded(pipe, request, patched=way) for way in (False, True))
    return Compared(unpatched, ours, figures, (records[0], records[1]))
