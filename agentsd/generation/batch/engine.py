"""Run many images: each is made once, whatever is killed, full or out of memory."""

from __future__ import annotations

import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from diffusers import DiffusionPipeline

from ...progress import Bar
from .batch_maker import BatchMaker, Inputs
from .claims import Claims
from .image_writer import ImageWriter
from .jobs import Job, batches
from .run_folder import RunFolder
from .shards import pack


@dataclass(frozen=True)
class Work:
    """What a run makes.

    Args:
        jobs: Iterates over its images in order, afresh at each call.
        total: How many images.
        batch_size: Images at a time.
        model: What the pipeline was loaded from, for the record.
        form: ``png``, ``jpg``, ``webp``, or ``webdataset`` for PNGs in shards.
        options: What was added to the pipeline, for the record.
        inputs: Further arguments of the pipeline's call.
        batch_position: To regenerate one image bit for bit: its index in the batch that it was
            made in, and the size of that batch. Kernels differ in the last bits between batch
            sizes.
    """

    jobs: Callable[[], Iterator[Job]]
    total: int
    batch_size: int
    model: str
    form: str = "png"
    options: Mapping[str, Any] = field(default_factory=dict)
    inputs: Inputs = lambda height, width: {}
    batch_position: tuple[int, int] | None = None


class Stop:
    """Whether a signal asked the run to end, and which."""

    signal: int | None = None


@contextmanager
def stopping(*, insist: bool) -> Iterator[Stop]:
    """Let SIGINT and SIGTERM end a run after the current batch; a no-op outside the main thread.

    Args:
        insist: Whether a second SIGINT ends the run at once. A launcher of several processes
            sends one more for each that the terminal sends.

    Yields:
        The flag that the signals set.
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

    Returns when all images are made or have failed, those of other processes too, or when ``stop``
    is set.

    Args:
        pipe: Loaded, configured and unpatched; it is unpatched again at the end.
        folder: Prepared, and opened for ``work.total`` images.
        work: What to make.
        claims: Claims of this process on the folder.
        bar: Shows the progress of all processes.
        stop: Asks for an early end.

    Raises:
        OutputError: If the folder cannot be written to. What was made before stays.
        AgentSDError: If the very first batch fails for another reason than memory, since then the
            model or an option is wrong; later failures are noted in the folder.
    """
    pipe.set_progress_bar_config(disable=True)
    with ExitStack() as stack:
        most = max(8, 2 * work.batch_size)
        writer = stack.enter_context(ImageWriter(folder, work.form, bar.note, most))
        maker = stack.enter_context(
            BatchMaker(
                pipe,
                folder,
                writer,
                bar.note,
                model=work.model,
                options=work.options,
                inputs=work.inputs,
                position=work.batch_position,
            )
        )
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
                # Other processes have claimed the rest, or died with it: look again later.
                time.sleep(max(0.5, time.monotonic() - begun))
    if folder.is_complete and claims.take("finish"):
        folder.merge()
        if work.form == "webdataset":
            pack(folder)
        shutil.rmtree(folder.claims, ignore_errors=True)


def _is_settled(folder: RunFolder, batch: Sequence[Job]) -> bool:
    return all(folder.is_settled(job.number) for job in batch)
