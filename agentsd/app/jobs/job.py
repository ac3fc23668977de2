"""The work of one visitor: it makes images, reports its progress, and can be stopped."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from ...generation.images import TimedImage, make_image
from ...generation.interleaving import warm_up, with_schedule
from ...image_settings import ImageSettings, warm_up_settings
from ...models.schedulers import scheduled
from ...schedule import Schedule
from .time_estimator import PlannedImage, TimeEstimator

ORIGINAL, OURS = "Original", "agentsd"
"""What visitors read for an unpatched and a patched image."""

PREVIEW_SHARE = 0.1
"""Largest share of a job's time that previews take; the times of images do not include it."""

PREVIEW_SIDE = 256
"""Pixels of a preview's longer side."""


class JobStopped(Exception):  # noqa: N818 - not an error
    """The visitor stopped the job or left, or the server is closing."""


class JobProgress(NamedTuple):
    """The progress of a job."""

    label: str
    """Which image is being made."""
    step: int
    steps: int
    share: float
    """Share of the whole job that is done, in [0, 1]."""
    seconds_left: float | None
    """For the rest of the job; ``None`` where nothing is known yet."""
    preview: Image.Image | None
    """The image decoded from the current latents, now and then."""


class Job:
    """The work of one visitor, which makes images and can be stopped.

    Args:
        report: Called in the worker's thread with each :class:`JobProgress`.
        images: The images that it will make, in order.
        estimator: Estimates times, and learns from this job.
        owner: Whose job it is, for :meth:`Worker.stop`.
        seconds: How long it takes, where that does not follow from its images.
    """

    def __init__(
        self,
        report: Callable[[JobProgress], None],
        images: Sequence[PlannedImage],
        estimator: TimeEstimator,
        owner: Hashable = None,
        seconds: float | None = None,
    ) -> None:
        self._report = report
        self._images = images
        self._estimator = estimator
        self.owner = owner
        self.running = False
        self._made = 0
        self._stopped = threading.Event()
        self._begun = self._reported = time.perf_counter()
        self._left = seconds
        self._previews = 0.0  # seconds that previews took

    def begin(self) -> None:
        """Start the job's clock, when its turn has come."""
        self.check()
        self._begun = time.perf_counter()
        self.running = True

    def stop(self) -> None:
        """End the job within one denoising step; may be called from any thread."""
        self._stopped.set()

    @property
    def stopping(self) -> bool:
        """Whether the job was stopped."""
        return self._stopped.is_set()

    def check(self) -> None:
        """Raise :class:`JobStopped` if the job was stopped."""
        if self.stopping:
            raise JobStopped

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the job is done; ``None`` where nothing is known yet."""
        if self._left is None:
            return self._estimator.seconds([*map(_one_step, self._cold_images()), *self._images])
        passed = time.perf_counter() - self._reported if self.running else 0.0
        return max(0.0, self._left - passed)

    def _cold_images(self) -> list[PlannedImage]:
        """One image of each kind whose size is new, patched and unpatched."""
        kinds = {
            (image.settings.height, image.settings.width, image.schedule is None): image
            for image in self._images
            if not self._estimator.is_warm(image)
        }
        return list(kinds.values())

    def warm_up(
        self, pipe: DiffusionPipeline, call_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        """Run a step of each kind of image whose size is new, so that no time includes it.

        Args:
            pipe: The planned images' pipeline, or one that shares its models.
            call_kwargs: Further arguments of its call.
        """
        for number, image in enumerate(cold := self._cold_images()):
            name = ORIGINAL if image.schedule is None else OURS
            left = self._estimator.seconds([*map(_one_step, cold[number:]), *self._images])
            self.tell(f"Warm-up, as this size is new ({name})", left)
            with scheduled(pipe, image.scheduler):
                variants = {name: with_schedule(image.schedule)}
                short = warm_up_settings(image.settings, 1, call_kwargs)
                begun = time.perf_counter()
                warm_up(pipe, variants, short, make=self._make_unseen, call_kwargs=call_kwargs)
            self._estimator.learn(_one_step(image), time.perf_counter() - begun)

    def _make_unseen(
        self,
        pipe: DiffusionPipeline,
        settings: ImageSettings,
        label: str = "",
        call_kwargs: Mapping[str, Any] | None = None,
    ) -> TimedImage:
        self.check()
        return make_image(pipe, settings, label, call_kwargs)

    def make(
        self,
        pipe: DiffusionPipeline,
        settings: ImageSettings,
        schedule: Schedule | None = None,
        scheduler: str | None = None,
        label: str = "",
        call_kwargs: Mapping[str, Any] | None = None,
    ) -> TimedImage:
        """Make one image; patch and scheduler are undone afterwards, even after an error.

        Args:
            pipe: An unpatched pipeline.
            settings: Settings of the image.
            schedule: ``None`` for the unpatched image.
            scheduler: As for :class:`agentsd.models.options.PipelineOptions`.
            label: What the progress calls the image.
            call_kwargs: Further arguments of the pipeline's call.

        Returns:
            The image and its seconds, not counting previews.

        Raises:
            JobStopped: If the job is stopped.
            AgentSDError: As :func:`agentsd.generation.images.make_image` and ``patched`` do.
        """
        self.check()
        with scheduled(pipe, scheduler), with_schedule(schedule)(pipe):
            return self.make_shown(pipe, settings, label, call_kwargs)

    def make_shown(
        self,
        pipe: DiffusionPipeline,
        settings: ImageSettings,
        label: str = "",
        call_kwargs: Mapping[str, Any] | None = None,
        on_step: Callable[[float, torch.Tensor], None] | None = None,
    ) -> TimedImage:
        """Make the next planned image with the pipeline as it is, and show its progress.

        Arguments and errors are as for :meth:`make`; ``on_step`` is called after each step with the
        seconds so far and the latents.
        """
        before, begun = self._previews, time.perf_counter()
        image, later = self._images[self._made], self._images[self._made + 1 :]

        def step(pipe: Any, index: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            self.check()
            seconds = time.perf_counter() - begun - (self._previews - before)
            if on_step is not None:
                on_step(seconds, tensors["latents"])
            done, steps = index + 1, pipe.num_timesteps
            self._estimator.learn(image, seconds, done / steps)
            preview = self._preview(pipe, tensors["latents"]) if done < steps else None
            left = seconds / done * (steps - done) + (self._estimator.seconds(later) or 0)
            self.tell(label, left, done, steps, preview)
            return tensors

        self.check()
        made = make_image(
            pipe, settings, call_kwargs={"callback_on_step_end": step, **(call_kwargs or {})}
        )
        made = made._replace(seconds=made.seconds - (self._previews - before))
        self._estimator.learn(image, made.seconds)
        self._made += 1
        return made

    def tell(
        self,
        label: str,
        left: float | None,
        step: int = 0,
        steps: int = 1,
        preview: Image.Image | None = None,
    ) -> None:
        """Report progress: what is done now, the seconds left, and the step of an image."""
        self._left, self._reported = left, time.perf_counter()
        elapsed = self._reported - self._begun
        share = 0.0 if left is None else elapsed / (elapsed + left)
        self._report(JobProgress(label, step, steps, share, left, preview))

    def _preview(self, pipe: Any, latents: torch.Tensor) -> Image.Image | None:
        """Decode the latents, unless previews have taken too much of the time so far."""
        begun = time.perf_counter()
        if self._previews > PREVIEW_SHARE * (begun - self._begun) or _overflows(pipe.vae):
            return None
        with torch.no_grad():
            sample = pipe.vae.decode(latents[:1] / pipe.vae.config.scaling_factor).sample
        image: Image.Image = pipe.image_processor.postprocess(sample.detach(), "pil")[0]
        image.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
        self._previews += time.perf_counter() - begun
        return image


def _one_step(image: PlannedImage) -> PlannedImage:
    """The image of a warm-up."""
    return image._replace(settings=warm_up_settings(image.settings, 1), strength=1.0)


def _overflows(vae: Any) -> bool:
    """Whether a VAE must be cast to float32 to decode, as SDXL's; too slow for a preview."""
    return bool(vae.dtype == torch.float16 and vae.config.get("force_upcast"))
