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
from ..image_settings import ImageSettings
from ..models.schedulers import scheduled
from ..patching.deep_features import whole_steps
from ..patching.inspection import inspect_patch
from ..patching.patch import patched
from ..schedule import Schedule
from .catalog import ImageRequest
from .job import Job
from .pace import PlannedImage

ClipScorer = Callable[[Image.Image, str], float]
"""The CLIP score of an image and a prompt."""


class Compared(NamedTuple):
    """Two images from one seed, and their figures."""

    unpatched: TimedImage
    ours: TimedImage
    figures: dict[str, Any]
    """Seconds of both, their ratio, whether the patch changes nothing, the PSNR in dB (``None`` for
    equal images, or if a safety checker hid one), whether it hid them and, if there is a scorer,
    the CLIP scores."""
    records: tuple[ImageRecord, ImageRecord]
    """The record of each image, which its file carries."""


def pocket_clip_scorer() -> ClipScorer:
    """A scorer by the pocket model's own CLIP, which knows only the words of that model."""
    model: Clip = load_clip("pocket")

    def score(image: Image.Image, prompt: str) -> float:
        return float(clip_score(model([image]), model.embed_texts([prompt])[0])[0])

    return score


def compare(
    job: Job, pipe: DiffusionPipeline, request: ImageRequest, scorer: ClipScorer | None = None
) -> Compared:
    """Make the unpatched and the patched image of a request.

    Raises:
        Stopped: If the job is stopped.
        AgentSDError: As :meth:`Job.make`.
    """
    settings = request.settings
    schedules = {"unpatched": None, "patched": request.schedule}
    variants = {name: with_schedule(schedule) for name, schedule in schedules.items()}
    job.warm_up()
    with scheduled(pipe, request.scheduler):
        made = dict(in_turns(pipe, variants, settings, make=job.make_shown))
        records = (recorded(pipe, request, None), recorded(pipe, request, request.schedule))
    unpatched, ours = made["unpatched"], made["patched"]
    figures: dict[str, Any] = {
        "unpatched_seconds": round(unpatched.seconds, 3),
        "seconds": round(ours.seconds, 3),
        "speedup": round(unpatched.seconds / ours.seconds, 3),
        "unchanged": changes_nothing(pipe, settings, request.schedule),
        "psnr": visible_psnr(ours, unpatched),
        "unpatched_nsfw_content_detected": unpatched.nsfw_content_detected,
        "nsfw_content_detected": ours.nsfw_content_detected,
    }
    if scorer is not None:
        scores = [scorer(each.image, settings.prompt) for each in (unpatched, ours)]
        figures |= dict(zip(("unpatched_clip_score", "clip_score"), scores, strict=True))
    return Compared(unpatched, ours, figures, records)


def planned(pipe: DiffusionPipeline, request: ImageRequest) -> list[PlannedImage]:
    """The images that :func:`compare` makes, in order."""
    return [
        PlannedImage(pipe, request.settings, schedule, request.scheduler)
        for schedule in (None, request.schedule)
    ]


def changes_nothing(pipe: DiffusionPipeline, settings: ImageSettings, schedule: Schedule) -> bool:
    """Whether a schedule leaves every layer and every step of an image as it is."""
    with patched(pipe, schedule):
        layers = inspect_patch(pipe, settings.height, settings.width)["layers"]
    methods = {phase["method"] for layer in layers for phase in layer["phases"]}
    return methods <= {"full"} and all(whole_steps(schedule, settings.num_inference_steps))


def recorded(
    pipe: DiffusionPipeline, request: ImageRequest, schedule: Schedule | None
) -> ImageRecord:
    """The record of a request's image, made by a pipeline that has the request's scheduler."""
    return ImageRecord.of(pipe, request.settings, request.model, schedule)
