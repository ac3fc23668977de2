"""A run of many images: every job made once, whatever is killed, full or out of memory."""

from __future__ import annotations

import shutil
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

from accelerate.utils.memory import clear_device_cache
from diffusers import DiffusionPipeline

from ...errors import AgentSDError, GenerationError, OutOfMemoryError
from ...image_settings import ImageSettings, warm_up_settings
from ...patching.patch import patched
from ...progress import Bar
from ...schedule import Schedule
from ..image_files import encode_image
from ..images import HIDDEN, Drawn, make_batch, to_image
from ..prompt_encoding import PromptEncoder, warnings_for
from ..records import shared_record
from .claims import Claims
from .prompts import Job, batches
from .run_folder import RunFolder
from .shards import pack

WRITERS = 2
"""Threads that encode and write; zlib and the disk let others run meanwhile."""

LARGEST_BATCH = 64

TOLD_NOTES = 5
"""Notes on prompts that are printed; the manifest has those of all."""

Inputs = Callable[[int | None, int | None], Mapping[str, Any]]
"""More to call a pipeline with, for images of a height and width."""


@dataclass(frozen=True)
class Work:
    """What a run makes.

    Args:
        jobs: Its images in order, anew at each call.
        total: How many they are.
        batch_size: Images to make at a time.
        model: What the pipeline was loaded from, for the record.
        form: ``png``, ``jpg``, ``webp``, or ``webdataset`` for PNGs in shards.
        options: What was added to the pipeline, for the record.
        inputs: More to call the pipeline with.
        place: To make one image again bit for bit: its place in the batch that it was made in,
            and this batch's size. Kernels differ in the last bits between sizes of a batch.
    """

    jobs: Callable[[], Iterator[Job]]
    total: int
    batch_size: int
    model: str
    form: str = "png"
    options: Mapping[str, Any] = field(default_factory=dict)
    inputs: Inputs = lambda height, width: {}
    place: tuple[int, int] | None = None


class Stop:
    """Whether a signal asked the run to end, and which."""

    signal: int | None = None


@contextmanager
def stopping(*, insist: bool) -> Iterator[Stop]:
    """Let SIGINT and SIGTERM end a run after the batch in hand; outside the main thread, nothing.

    Args:
        insist: Whether a second SIGINT ends the run at once. A launcher of several processes
            sends one more for each that the terminal sends.

    Yields:
        What tells of them.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(number: int, _: Any) -> None:
        stop.signal = stop.signal or number
        if insist:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(
    pipe: DiffusionPipeline, folder: RunFolder, work: Work, claims: Claims, bar: Bar, stop: Stop
) -> None:
    """Make what is missing of a run; several processes may do so in one folder.

    Returns when all images are made or have failed, those of other processes too, or when
    ``stop`` says so. The folder's manifest then says what there is.

    Args:
        pipe: Loaded and equipped; its patch, if any, is put back in the end.
        folder: Prepared, and open for ``work.total`` images.
        work: What to make.
        claims: This process's, of the folder.
        bar: Shows the progress of all processes.
        stop: Asks for an early end.

    Raises:
        OutputError: If the folder cannot be written to. What was made before stays.
        AgentSDError: If the very first batch fails for another reason than memory, since then it
            is the model or an option that is wrong; later ones are noted as failed.
    """
    pipe.set_progress_bar_config(disable=True)
    with ExitStack() as stack:
        writer = stack.enter_context(_Writer(folder, work, bar.note, max(8, 2 * work.batch_size)))
        maker = stack.enter_context(_Maker(pipe, folder, work, bar, writer))
        while not (folder.is_complete or stop.signal):
            begun, idle = time.monotonic(), True
            for batch in batches(work.jobs(), work.batch_size):
                if stop.signal:
                    break
                if _is_settled(folder, batch) or not claims.take(str(batch[0].number)):
                    continue
                folder.poll()  # it may have been made between the last look and the claim
                if not _is_settled(folder, batch):
                    maker.make(batch)
                    idle = False
                folder.poll()
                bar.show(folder.made + folder.failed)
            writer.drain()
            folder.poll()
            bar.show(folder.made + folder.failed)
            if idle and not (folder.is_complete or stop.signal):
                # The rest is in the hands of others, or of one who died: look again later.
                time.sleep(max(0.5, time.monotonic() - begun))
    if folder.is_complete and claims.take("finish"):
        folder.merge()
        if work.form == "webdataset":
            pack(folder)
        shutil.rmtree(folder.claims, ignore_errors=True)


def _is_settled(folder: RunFolder, batch: Sequence[Job]) -> bool:
    return all(folder.is_settled(job.number) for job in batch)


def largest_batch(pipe: DiffusionPipeline, settings: ImageSettings, inputs: Inputs) -> int:
    """The largest batch that fits, a power of two up to 64; 1 on the CPU, which gains nothing."""
    if pipe._execution_device.type == "cpu":
        return 1
    pipe.set_progress_bar_config(disable=True)
    more = inputs(settings.height, settings.width)
    short = warm_up_settings(settings, 2, more)
    encode, size = PromptEncoder(pipe), 1
    while size < LARGEST_BATCH:
        try:
            make_batch(pipe, [short] * (2 * size), encode, more)
        except OutOfMemoryError:
            break
        size *= 2
    clear_device_cache(garbage_collection=True)
    return size


class _Maker:
    """Makes batches with one pipeline, halved where they do not fit."""

    def __init__(
        self, pipe: DiffusionPipeline, folder: RunFolder, work: Work, bar: Bar, writer: _Writer
    ) -> None:
        self._pipe, self._folder, self._work, self._bar = pipe, folder, work, bar
        self._writer = writer
        self._encode = PromptEncoder(pipe)
        self._device = str(pipe._execution_device)
        self._made_by = lru_cache(maxsize=64)(
            partial(shared_record, pipe, work.model, options=work.options)
        )
        self._notes = lru_cache(maxsize=64)(self._look)
        self._told: set[str] = set()
        self._fits: dict[tuple[Any, ...], int] = {}
        self._patch = ExitStack()
        self._schedule: Schedule | None = None

    def __enter__(self) -> _Maker:
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.close()

    def make(self, batch: Sequence[Job]) -> None:
        """Make a batch and hand its images to the writer, or note them as failed."""
        kind, left = batch[0].kind, batch
        while left:
            part = left[: self._fits.get(kind, len(left))]
            failure = self._try(part)
            if failure is not None:
                # Not in the except clause: until it ends, the error holds on to the memory.
                clear_device_cache(garbage_collection=True)
                if isinstance(failure, OutOfMemoryError) and len(part) > 1:
                    half = self._fits[kind] = len(part) // 2
                    self._bar.note(f"note: {len(part)} images at once are too many; trying {half}")
                    continue
                for job in part:
                    self._bar.note(f"note: image {job.id} failed: {failure}")
                    self._folder.fail(_told(job) | {"error": str(failure)})
            left = left[len(part) :]

    def _try(self, batch: Sequence[Job]) -> AgentSDError | None:
        first, begun = batch[0], time.perf_counter()
        try:
            self._patch_with(first.schedule)
            inputs = self._work.inputs(first.settings.height, first.settings.width)
            place, size = self._work.place or (0, 1)
            settings = [job.settings for job in batch for _ in range(size)]
            images = make_batch(self._pipe, settings, self._encode, inputs)[place::size]
        except AgentSDError as error:
            memory = isinstance(error, OutOfMemoryError)
            if not (memory or self._writer.used or self._folder.made):
                raise  # the model or an option is wrong, not this row
            return type(error)(str(error))
        seconds = (time.perf_counter() - begun) / len(batch)
        for i, (job, drawn) in enumerate(zip(batch, images, strict=True)):
            if self._folder.is_settled(job.number):
                continue  # a batch is made whole, so that its images are as they would have been
            recorded = job.settings.model_dump() | self._made_by(job.schedule)
            recorded["batch"] = list(self._work.place or (i, len(batch)))
            more = {
                "seconds": round(seconds, 4),
                "device": self._device,
                # Seeds do not matter, and would fill the cache.
                "notes": self._notes(job.settings.model_copy(update={"seed": 0})),
            }
            self._writer.put(job, drawn, recorded, more)
        return None

    def _look(self, settings: ImageSettings) -> list[str]:
        """What the model will miss of the prompts; told of the first few, recorded of all."""
        found = warnings_for(self._pipe, settings)
        for note in found:
            if note not in self._told and len(self._told) < TOLD_NOTES:
                self._told.add(note)
                self._bar.note(f"note: {note}")
        return found

    def _patch_with(self, schedule: Schedule | None) -> None:
        if schedule != self._schedule:
            self._patch.close()
            self._schedule = None
            if schedule is not None:
                self._patch.enter_context(patched(self._pipe, schedule))
            self._schedule = schedule


class _Writer:
    """Encodes, hashes and writes images in the background; ``put`` waits when many are pending."""

    def __init__(
        self, folder: RunFolder, work: Work, note: Callable[[str], None], most: int
    ) -> None:
        self._folder, self._note = folder, note
        self._form = "png" if work.form == "webdataset" else work.form
        self._most = most
        self._pool = ThreadPoolExecutor(WRITERS, thread_name_prefix="writer")
        self._pending: deque[Future[None]] = deque()
        self.used = False

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True)  # what is made is written, even if the run ends in an error

    def put(self, job: Job, drawn: Drawn, recorded: dict[str, Any], more: dict[str, Any]) -> None:
        """Have an image written.

        Raises:
            OutputError: If an earlier one could not be.
        """
        self.used = True
        while self._pending and (self._pending[0].done() or len(self._pending) >= self._most):
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(self._write, job, drawn, recorded, more))

    def drain(self) -> None:
        """Wait until all images are written.

        Raises:
            OutputError: If one could not be.
        """
        while self._pending:
            self._pending.popleft().result()

    def _write(
        self, job: Job, drawn: Drawn, recorded: dict[str, Any], more: dict[str, Any]
    ) -> None:
        try:
            image = to_image(drawn.pixels)
            recorded |= {"height": image.height, "width": image.width}
            data = encode_image(image, recorded, self._form)
        except GenerationError as error:
            self._note(f"note: image {job.id} failed: {error}")
            self._folder.fail(_told(job) | {"error": str(error)})
            return
        flag = drawn.nsfw_content_detected
        line = {**_told(job), **recorded, **more, "nsfw_content_detected": flag}
        self._folder.save(f"images/{job.id}.{self._form}", data, line)
        if flag:
            self._note(f"note: image {job.id}: {HIDDEN}")


def _told(job: Job) -> dict[str, Any]:
    return {
        "id": job.id,
        "number": job.number,
        "prompt_index": job.prompt_index,
        "image_index": job.image_index,
        "prompt": job.settings.prompt,
        "seed": job.settings.seed,
    }
