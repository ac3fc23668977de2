"""One device, many visitors: jobs run one at a time, and the others are told of their place."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Hashable, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Any, Generic, NamedTuple, TypeVar

from diffusers import DiffusionPipeline

from ...errors import AgentSDError, LoadError
from .job import Job, JobProgress, JobStopped
from .time_estimator import PlannedImage, TimeEstimator

T = TypeVar("T")

PATIENCE = 1.0
"""Seconds without progress after which a job yields anyway, and so notices a visitor who left."""


class QueueFullError(AgentSDError):
    """As many jobs are waiting as may."""


class Queued(NamedTuple):
    """A job waits for others."""

    place: int
    """How many jobs come first, at least 1."""
    seconds: float | None
    """Until they are done; ``None`` where nothing is known of one of them."""


class Finished(NamedTuple, Generic[T]):
    """The result of a job."""

    result: T


Event = Queued | JobProgress | Finished[T] | None
"""What happens to a job; ``None`` where nothing has for a while."""


class Worker:
    """Runs jobs one at a time, in its own thread.

    Args:
        pipes: The pipelines, by the names that visitors choose from.
        queue_size: How many jobs may wait.

    Raises:
        LoadError: If a pipeline has no step callback, which following and stopping need.
    """

    def __init__(self, pipes: Mapping[str, DiffusionPipeline], queue_size: int = 32) -> None:
        for name, pipe in pipes.items():
            if "callback_on_step_end" not in inspect.signature(pipe.__call__).parameters:
                raise LoadError(
                    f"{name} is a {type(pipe).__name__}, which has no callback_on_step_end; "
                    "choose another model"
                )
        self.pipes = pipes
        self._queue_size = queue_size
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="agentsd")
        self._accepted: set[Job] = set()  # a visitor may stop these before they are queued
        self._jobs: dict[Job, Future[Any]] = {}
        self._closed = False
        self.estimator = TimeEstimator(*pipes.values())

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
        for job in list(self._accepted):
            job.stop()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def stop(self, owner: Hashable) -> None:
        """Stop the jobs of an owner, whether they run, wait or are about to."""
        for job in list(self._accepted):
            if job.owner == owner:
                self._stop(job)

    def _stop(self, job: Job) -> None:
        job.stop()
        if job in self._jobs:
            self._jobs[job].cancel()

    @asynccontextmanager
    async def follow(
        self,
        work: Callable[[Job], T],
        images: Sequence[PlannedImage],
        owner: Hashable = None,
        seconds: float | None = None,
    ) -> AsyncIterator[AsyncIterator[Event[T]]]:
        """Run work when its turn comes, and follow its progress; leaving the block stops it.

        Args:
            work: Called in the worker's thread.
            images: The images that it makes, in order.
            owner: Whose job it is, for :meth:`stop`.
            seconds: How long it takes, where that does not follow from its images.

        Yields:
            :class:`Queued` while other jobs come first, each :class:`JobProgress`, ``None`` after a
            while without either, and finally :class:`Finished` with the result. Raises what the
            work raises, :class:`~agentsd.app.jobs.job.JobStopped`, and :class:`QueueFullError` if
            too many jobs are waiting.
        """
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[JobProgress | Future[T]] = asyncio.Queue()

        def report(event: JobProgress | Future[T]) -> None:
            with suppress(RuntimeError):  # the loop is closed once the server ends
                loop.call_soon_threadsafe(queue.put_nowait, event)

        job = Job(report, images, self.estimator, owner, seconds)

        async def events() -> AsyncIterator[Event[T]]:
            await asyncio.to_thread(self.estimator.prepare, images)
            job.check()
            self._submit(job, work).add_done_callback(report)
            async for event in self._events(job, queue):
                yield event

        self._accepted.add(job)
        try:
            yield events()
        finally:
            self._accepted.discard(job)
            self._stop(job)

    def _submit(self, job: Job, work: Callable[[Job], T]) -> Future[T]:
        if len(self._jobs) > self._queue_size:
            raise QueueFullError(
                f"the queue is full ({self._queue_size} waiting); try again in a while"
            )

        def run() -> T:
            job.begin()
            return work(job)

        future = self._jobs[job] = self._thread.submit(run)
        future.add_done_callback(lambda _: self._jobs.pop(job, None))
        return future

    async def _events(
        self, job: Job, queue: asyncio.Queue[JobProgress | Future[T]]
    ) -> AsyncIterator[Event[T]]:
        yield self._wait(job)
        while True:
            try:
                event = await asyncio.wait_for(queue.get(), PATIENCE)
            except asyncio.TimeoutError:
                yield self._wait(job)
                continue
            if isinstance(event, Future):
                try:
                    result = event.result()
                except CancelledError:
                    raise JobStopped from None
                yield Finished(result)
                return
            yield event

    def _wait(self, job: Job) -> Queued | None:
        """What a job waits for; ``None`` if it has begun."""
        jobs = list(self._jobs)
        if job.running or job not in jobs:
            return None
        first = jobs[: jobs.index(job)]
        if not first:
            return None
        seconds = [one.seconds_left for one in first]
        known = [one for one in seconds if one is not None]
        return Queued(len(first), sum(known) if len(known) == len(seconds) else None)
