"""Encode, hash and write images in the background."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from ...errors import GenerationError
from ..image_files import encode_image
from ..images import HIDDEN, RawImage, to_image
from ..records import ImageRecord, manifest_entry
from .jobs import Job
from .run_folder import RunFolder

WRITERS = 2
"""Threads; zlib and the disk let others run meanwhile."""


class ImageWriter:
    """Writes images and their manifest entries in the background.

    Args:
        folder: Of the run.
        form: ``png``, ``jpg``, ``webp`` or ``webdataset``.
        note: Called with what users should know.
        most: Images that may wait; :meth:`put` blocks while there are more.
    """

    def __init__(
        self, folder: RunFolder, form: str, note: Callable[[str], None], most: int
    ) -> None:
        self._folder, self._note, self._most = folder, note, most
        self._form = "png" if form == "webdataset" else form
        self._pool = ThreadPoolExecutor(WRITERS, thread_name_prefix="writer")
        self._pending: deque[Future[None]] = deque()
        self.used = False

    def __enter__(self) -> ImageWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True)  # what is made is written, even if the run ends in an error

    def put(self, job: Job, raw: RawImage, record: ImageRecord, more: dict[str, Any]) -> None:
        """Have an image written.

        Args:
            job: The image's.
            raw: As the pipeline made it.
            record: Of the image, but for its size.
            more: What else its manifest entry says.

        Raises:
            OutputError: If an earlier one could not be written.
        """
        self.used = True
        while self._pending and (self._pending[0].done() or len(self._pending) >= self._most):
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(self._write, job, raw, record, more))

    def drain(self) -> None:
        """Wait until all images are written.

        Raises:
            OutputError: If one could not be.
        """
        while self._pending:
            self._pending.popleft().result()

    def _write(self, job: Job, raw: RawImage, record: ImageRecord, more: dict[str, Any]) -> None:
        try:
            image = to_image(raw.pixels)
            record = replace(record, size=image.size)
            data = encode_image(image, record, self._form)
        except GenerationError as error:
            self._note(f"note: image {job.id} failed: {error}")
            self._folder.fail(job.identity() | {"error": str(error)})
            return
        hidden = raw.nsfw_content_detected
        entry = manifest_entry(record, **job.identity() | more, nsfw_content_detected=hidden)
        self._folder.save(f"images/{job.id}.{self._form}", data, entry)
        if hidden:
            self._note(f"note: image {job.id}: {HIDDEN}")
