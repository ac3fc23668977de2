"""One device, many visitors: jobs run one at a time, report progress, and can be stopped."""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from ..errors import LoadError
from ..generation.images import TimedImage, make_image
from ..generation.turns import Apply, warm_up, with_schedule
from ..image_settings import ImageSettings, warm_up_settings
from ..models.schedulers import scheduled
from ..schedule import Schedule

T = TypeVar("T")

PREVIEW_SHARE = 0.1
"""Largest share of a job's time that previews take; the times of images do not include it."""

PREVIEW_SIDE = 256
"""Pixels of a preview's longer side."""

PATIENCE = 1.0
"""Seconds without progress after which a job yields anyway, and so notices a visitor who left."""


class Stopped(Exception):  # noqa: N818 - nothing went wrong
    """The visitor stopped the job or left, or the server is closing."""


class Progress(NamedTuple):
    """The progress of a job."""

    label: str
    """Which image is being made."""
    step: int
    steps: int
    share: float
    """Share of the whole job that is done, in [0, 1]."""
    seconds_left: float
    """For the rest of the job, estimated from its steps so far."""
    preview: Image.Image | None
    """The image decoded from the current latents, now and then."""


class Finished(NamedTuple, Generic[T]):
    """The result of a job."""

    result: T


class Job:
    """The work of one visitor, which makes images and can be stopped.

    Args:
        report: Called in the worker's thread with each :class:`Progress`.
        images: How many images it will make.
        warm: Pipelines and sizes that have run before, in this job or another.
    """

    def __init__(
        self, report: Callable[[Progress], None], images: int, warm: set[tuple[int, ...]]
    ) -> None:
        self._report = report
        self._warm = warm
        self._images = images
        self._made = 0
        self._stopped = threading.Event()
        self._begun = time.perf_counter()
        self._previews = 0.0  # seconds that previews took

    def stop(self) -> None:
        """End the job within one denoising step; may be called from any thread."""
        self._stopped.set()

    def check(self) -> None:
        """Raise :class:`Stopped` if the job was stopped."""
        if self._stopped.is_set():
            raise Stopped

    def warm_up(
        self,
        pipe: DiffusionPipeline,
        variants: Mapping[str, Apply],
        settings: ImageSettings,
        inputs: Mapping[str, Any] | None = None,
    ) -> None:
        """Run a step of each variant at a size that is new, so that no image's time includes it."""
        size = id(pipe), settings.height or 0, settings.width or 0
        if size not in self._warm:
            short = warm_up_settings(settings, 1, inputs)
            warm_up(pipe, variants, short, make=self._make_unseen, inputs=inputs)
            self._warm.add(size)

    def _make_unseen(
        self,
        pipe: DiffusionPipeline,
        settings: ImageSettings,
        label: str = "",
        inputs: Mapping[str, Any] | None = None,
    ) -> TimedImage:
        self.check()
        return make_image(pipe, settings, label, inputs)

    def make(
        self,
        pipe: DiffusionPipeline,
        settings: ImageSettings,
        schedule: Schedule | None = None,
        scheduler: str | None = None,
        label: str = "",
        inputs: Mapping[str, Any] | None = None,
    ) -> TimedImage:
        """Make one image; patch and scheduler are undone afterwards, even after an error.

        Args:
            pipe: An unpatched pipeline.
            settings: Settings of the image.
            schedule: ``None`` for the unpatched image.
            scheduler: As for :class:`agentsd.models.options.PipelineOptions`.
            label: What the progress calls the image.
            inputs: Further arguments of the pipeline's call.

        Returns:
            The image and its seconds, not counting previews.

        Raises:
            Stopped: If the job is stopped.
            AgentSDError: As :func:`agentsd.generation.images.make_image` and ``patched`` do.
        """
        self.check()
        with scheduled(pipe, scheduler), with_schedule(schedule)(pipe):
            return self.make_shown(pipe, settings, label, inputs)

    def make_shown(
        self,
        pipe: DiffusionPipeline,
        settings: ImageSettings,
        label: str = "",
        inputs: Mapping[str, Any] | None = None,
        on_step: Callable[[float, torch.Tensor], None] | None = None,
    ) -> TimedImage:
        """Make one image with the pipeline as it is, as :meth:`make`, and show its progress.

        ``on_step`` is called after each step with the seconds so far and the latents.
        """
        if self._made == 0:
            self._begun = time.perf_counter()
        before, started = self._previews, time.perf_counter()

        def step(pipe: Any, index: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            self.check()
            if on_step is not None:
                on_step(
                    time.perf_counter() - started - (self._previews - before), tensors["latents"]
                )
            steps = len(pipe.scheduler.timesteps)
            share = (self._made + (index + 1) / steps) / self._images
            elapsed = time.perf_counter() - self._begun
            preview = self._preview(pipe, tensors["latents"]) if index + 1 < steps else None
            left = elapsed * (1 - share) / share
            self._report(Progress(label, index + 1, steps, share, left, preview))
            return tensors

        self.check()
        made = make_image(pipe, settings, inputs={"callback_on_step_end": step, **(inputs or {})})
        self._made += 1
        return made._replace(seconds=made.seconds - (self._previews - before))

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


def _overflows(vae: Any) -> bool:
    """Whether a VAE must be cast to float32 to decode, as SDXL's; too slow for a preview."""
    return bool(vae.dtype == torch.float16 and vae.config.get("force_upcast"))


class Worker:
    """Runs jobs one at a time, in its own thread.

    Args:
        pipes: The pipelines, by the names that visitors choose from.

    Raises:
        LoadError: If a pipeline has no step callback, which following and stopping need.
    """

    def __init__(self, pipes: Mapping[str, DiffusionPipeline]) -> None:
        for name, pipe in pipes.items():
            if "callback_on_step_end" not in inspect.signature(pipe.__call__).parameters:
                raise LoadError(
                    f"{name} is a {type(pipe).__name__}, which has no callback_on_step_end; "
                    "choose another model"
                )
        self.pipes = pipes
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="agentsd")
        self._jobs: set[Job] = set()
        self._closed = False
        self._warm: set[tuple[int, ...]] = set()

    @property
    def waiting(self) -> int:
        """Number of jobs that are not done, including the running one."""
        return len(self._jobs)

    @property
    def open(self) -> bool:
        """Whether it accepts jobs."""
        return not self._closed

    def close(self) -> None:
        """Stop all jobs and accept no more."""
        self._closed = True
        for job in list(self._jobs):
            job.stop()
        self._thread.shutdown(wait=True, cancel_futures=True)

    @asynccontextmanager
    async def follow(
        self, work: Callable[[Job], T], images: int = 1
    ) -> AsyncIterator[AsyncIterator[Progress | Finished[T] | None]]:
        """Run work when its turn comes, and follow its progress; leaving the block stops it.

        Args:
            work: Called in the worker's thread.
            images: Number of images it makes.

        Yields:
            Each :class:`Progress`, ``None`` when there has been none for a while, and at the end
            :class:`Finished` with the result. Raises what the work raises.
        """
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Progress | Future[T]] = asyncio.Queue()

        def report(event: Progress | Future[T]) -> None:
            with suppress(RuntimeError):  # the loop is closed once the server ends
                loop.call_soon_threadsafe(queue.put_nowait, event)

        job = Job(report, images, self._warm)
        self._jobs.add(job)
        future = self._thread.submit(work, job)
        future.add_done_callback(report)
        future.add_done_callback(lambda _: self._jobs.discard(job))
        try:
            yield _events(queue)
        finally:
            job.stop()
            future.cancel()


async def _events(
    queue: asyncio.Queue[Progress | Future[T]],
) -> AsyncIterator[Progress | Finished[T] | None]:
    while True:
        try:
            event = await asyncio.wait_for(queue.get(), PATIENCE)
        except asyncio.TimeoutError:
            yield None
            continue
        if isinstance(event, Future):
            yield Finished(event.result())
            return
        yield event
