"""Make batches of images with one pipeline, smaller ones where memory is short."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import lru_cache
from typing import Any

from accelerate.utils.memory import clear_device_cache
from diffusers import DiffusionPipeline

from ...errors import AgentSDError, OutOfMemoryError
from ...image_settings import ImageSettings, warm_up_settings
from ...patching.patch import patched
from ...schedule import Schedule
from ..images import make_batch
from ..prompt_encoding import PromptEncoder, warnings_for
from ..records import ImageRecord
from .image_writer import ImageWriter
from .jobs import Job
from .run_folder import RunFolder

LARGEST_FOUND = 64
"""Images; :func:`largest_batch` tries no more."""

SHOWN_NOTES = 5
"""Notes on prompts that are printed; the manifest has those of all."""

Inputs = Callable[[int | None, int | None], Mapping[str, Any]]
"""Further arguments of a pipeline's call, for images of a height and width."""


def largest_batch(pipe: DiffusionPipeline, settings: ImageSettings, inputs: Inputs) -> int:
    """Find the largest batch that fits, a power of two up to 64; 1 on the CPU, which gains nothing.

    Args:
        pipe: The pipeline.
        settings: Of the images.
        inputs: Further arguments of the call.
    """
    if pipe._execution_device.type == "cpu":
        return 1
    pipe.set_progress_bar_config(disable=True)
    more = inputs(settings.height, settings.width)
    short = warm_up_settings(settings, 2, more)
    encode, size = PromptEncoder(pipe), 1
    while size < LARGEST_FOUND:
        try:
            make_batch(pipe, [short] * (2 * size), encode, more)
        except OutOfMemoryError:
            break
        size *= 2
    clear_device_cache(garbage_collection=True)
    return size


class BatchMaker:
    """Makes batches with one pipeline, and halves those that do not fit into memory.

    Args:
        pipe: Unpatched, and again so after the ``with`` block.
        folder: Where images are noted as failed.
        writer: Writes the images.
        note: Called with what users should know.
        model: What the pipeline was loaded from, for the record.
        options: What was added to it, for the record.
        inputs: Further arguments of its call.
        position: As ``batch_position`` of :class:`agentsd.generation.batch.engine.Work`.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        folder: RunFolder,
        writer: ImageWriter,
        note: Callable[[str], None],
        *,
        model: str,
        options: Mapping[str, Any],
        inputs: Inputs,
        position: tuple[int, int] | None,
    ) -> None:
        self._pipe, self._folder, self._writer, self._note = pipe, folder, writer, note
        self._model, self._options, self._inputs = model, options, inputs
        self._position = position
        self._encode = PromptEncoder(pipe)
        self._device = str(pipe._execution_device)
        self._record_of = lru_cache(maxsize=64)(self._new_record)
        self._warnings_for = lru_cache(maxsize=64)(self._new_warnings)
        self._shown: set[str] = set()
        self._fits: dict[tuple[Any, ...], int] = {}
        self._patch = ExitStack()
        self._schedule: Schedule | None = None

    def __enter__(self) -> BatchMaker:
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.close()

    def make(self, batch: Sequence[Job]) -> None:
        """Make a batch and hand its images to the writer, or note them as failed.

        Raises:
            OutputError: If the folder cannot be written to.
            AgentSDError: If the very first batch fails for another reason than memory.
        """
        key, left = batch[0].batch_key, batch
        while left:
            part = left[: self._fits.get(key, len(left))]
            failure = self._try(part)
            if failure is not None:
                # Not in the except clause: until it ends, the error holds on to the memory.
                clear_device_cache(garbage_collection=True)
                if isinstance(failure, OutOfMemoryError) and len(part) > 1:
                    half = self._fits[key] = len(part) // 2
                    self._note(f"note: {len(part)} images at once do not fit; trying {half}")
                    continue
                for job in part:
                    self._note(f"note: image {job.id} failed: {failure}")
                    self._folder.fail(job.identity() | {"error": str(failure)})
            left = left[len(part) :]

    def _try(self, batch: Sequence[Job]) -> AgentSDError | None:
        first, begun = batch[0], time.perf_counter()
        try:
            self._patch_with(first.schedule)
            inputs = self._inputs(first.settings.height, first.settings.width)
            index, size = self._position or (0, 1)
            settings = [job.settings for job in batch for _ in range(size)]
            images = make_batch(self._pipe, settings, self._encode, inputs)[index::size]
        except AgentSDError as error:
            memory = isinstance(error, OutOfMemoryError)
            if not (memory or self._writer.used or self._folder.made):
                raise  # the model or an option is wrong, not this row
            return type(error)(str(error))
        seconds = (time.perf_counter() - begun) / len(batch)
        for i, (job, raw) in enumerate(zip(batch, images, strict=True)):
            if self._folder.is_settled(job.number):
                continue  # it was made for the sake of the others, whose batch must be the same
            record = replace(
                self._record_of(job.schedule),
                settings=job.settings,
                batch=self._position or (i, len(batch)),
            )
            # Seeds do not matter to the warnings, and would fill the cache.
            notes = self._warnings_for(job.settings.model_copy(update={"seed": 0}))
            more = {"seconds": seconds, "device": self._device, "notes": notes}
            self._writer.put(job, raw, record, more)
        return None

    def _new_record(self, schedule: Schedule | None) -> ImageRecord:
        any_settings = ImageSettings(prompt="-")
        return ImageRecord.of(self._pipe, any_settings, self._model, schedule, self._options)

    def _new_warnings(self, settings: ImageSettings) -> list[str]:
        """What the model will miss of the prompts; only the first few warnings are printed."""
        found = warnings_for(self._pipe, settings)
        for warning in found:
            if warning not in self._shown and len(self._shown) < SHOWN_NOTES:
                self._shown.add(warning)
                self._note(f"note: {warning}")
        return found

    def _patch_with(self, schedule: Schedule | None) -> None:
        if schedule != self._schedule:
            self._patch.close()
            self._schedule = None
            if schedule is not None:
                self._patch.enter_context(patched(self._pipe, schedule))
            self._schedule = schedule
