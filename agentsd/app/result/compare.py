"""Make a request's image unpatched and patched, and measure how similar the two are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from diffusers import DiffusionPipeline
from PIL import Image

from ...evaluation.features import Clip, load_clip
from ...evaluation.metrics import clip_score
from ...generation.comparison import visible_psnr
from ...generation.images import TimedImage
from ...generation.interleaving import interleaved, with_schedule
from ...generation.records import ImageRecord
from ...image_settings import ImageSettings
from ...models.schedulers import scheduled
from ...patching.forecasts import whole_steps
from ...patching.inspection import inspect_patch
from ...patching.patch import patched
from ...schedule import Schedule
from ..jobs.job import ORIGINAL, OURS, Job
from ..jobs.time_estimator import PlannedImage
from ..requests.catalog import ImageRequest
from ..requests.request_options import public_record, with_options
from .race import Trace

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
    traces: tuple[Trace, Trace]
    """The steps of each image."""


def pocket_clip_scorer() -> ClipScorer:
    """A scorer by the pocket model's own CLIP, which knows only the words of that model."""
    model: Clip = load_clip("pocket")

    def score(image: Image.Image, prompt: str) -> float:
        return float(clip_score(model([image]), model.embed_texts([prompt])[0])[0])

    return score


def compare(
    job: Job,
    pipe: DiffusionPipeline,
    request: ImageRequest,
    scorer: ClipScorer | None = None,
    number: int = 0,
) -> Compared:
    """Make the patched and the unpatched image of a request.

    Args:
        job: The job that makes them.
        pipe: Unpatched.
        request: For one seed.
        scorer: Scores both images, if there is one for the model.
        number: Of the seed among several; the patched image comes first at every other one.

    Raises:
        JobStopped: If the job is stopped.
        AgentSDError: As :meth:`Job.make`.
    """
    settings = request.settings
    schedules = {OURS: request.schedule, ORIGINAL: None}
    variants = {name: with_schedule(schedule) for name, schedule in schedules.items()}
    traces = {name: Trace() for name in variants}

    def make(
        pipe: Any,
        settings: ImageSettings,
        label: str = "",
        call_kwargs: Mapping[str, Any] | None = None,
    ) -> TimedImage:
        name = label.partition(",")[0]
        return job.make_shown(pipe, settings, label, call_kwargs, on_step=traces[name].add)

    call_kwargs = request.options.call_kwargs(settings.height, settings.width)
    with with_options(pipe, request.options) as pipe:
        job.warm_up(pipe, call_kwargs)
        with scheduled(pipe, request.scheduler):
            label = "{}" if request.images == 1 else f"{{}}, seed {settings.seed}"
            images = interleaved(
                pipe, variants, settings, number, make=make, call_kwargs=call_kwargs, label=label
            )
            made = dict(images)
            records = (recorded(pipe, request, None), recorded(pipe, request, request.schedule))
    unpatched, ours = made[ORIGINAL], made[OURS]
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
    return Compared(unpatched, ours, figures, records, (traces[ORIGINAL], traces[OURS]))


def planned(pipe: DiffusionPipeline, request: ImageRequest) -> list[PlannedImage]:
    """The images that :func:`compare` makes of each seed in turn, in order."""
    share = 1.0 if request.options.init_image is None else request.options.strength
    images: list[PlannedImage] = []
    for number, one in enumerate(request.seeds()):
        pair = [
            PlannedImage(pipe, one.settings, schedule, one.scheduler, share)
            for schedule in (one.schedule, None)
        ]
        images += reversed(pair) if number % 2 else pair
    return images


def changes_nothing(pipe: DiffusionPipeline, settings: ImageSettings, schedule: Schedule) -> bool:
    """Whether a schedule leaves every layer and every step of an image as it is."""
    with patched(pipe, schedule):
        layers = inspect_patch(pipe, settings.height, settings.width).layers
    methods = {phase.method for layer in layers for phase in layer.phases}
    return methods <= {"full"} and all(whole_steps(schedule, settings.num_inference_steps))


def recorded(
    pipe: DiffusionPipeline, request: ImageRequest, schedule: Schedule | None
) -> ImageRecord:
    """The record of a request's image, made by a pipeline that has the request's scheduler."""
    options = public_record(request.options)
    return ImageRecord.of(pipe, request.settings, request.model, schedule, options)
