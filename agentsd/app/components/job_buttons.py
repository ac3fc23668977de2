"""Buttons that begin and stop a job, and the status that follows it to its end."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Hashable
from contextlib import AbstractAsyncContextManager
from typing import Any, NamedTuple

import gradio as gr

from ..jobs.job import JobProgress, JobStopped
from ..jobs.worker import Finished, Queued, Worker
from . import markup
from .events import DEVICE, PRIVATE, QUICK
from .page_errors import message

REVEAL = "() => window.agentsdReveal({status!r})"
"""Scrolls to a status that is out of sight, as it is below the controls on a phone."""


class PageJob(NamedTuple):
    """A job of the page, checked but not begun."""

    follow: Callable[[Hashable], AbstractAsyncContextManager[Any]]
    """Begins it for an owner; as :meth:`Worker.follow`."""
    finish: Callable[[Any], dict[Any, Any]]
    """Updates by component, the status among them, that show its result."""


class JobButtons:
    """A button that begins a job, one that stops it, and the status of the job.

    Args:
        worker: Runs the jobs.
        begin: A button.
        stop: A button, which can be used only while the job runs or waits.
        status: Where to show the progress, and errors; it needs an ``elem_id``.
    """

    def __init__(self, worker: Worker, begin: gr.Button, stop: gr.Button, status: gr.HTML) -> None:
        self._worker = worker
        self._begin, self._stop, self._status = begin, stop, status
        stop.interactive = False

    def connect(
        self, name: str, check: Callable[..., PageJob], inputs: list[Any], outputs: list[Any]
    ) -> None:
        """Follow the buttons.

        Args:
            name: Of the event.
            check: Makes the job from the values of ``inputs``, or raises what is wrong with them.
            inputs: As for an event of gradio.
            outputs: The components that show the result.
        """

        async def run(request: gr.Request, *values: Any) -> AsyncIterator[dict[Any, Any]]:
            try:
                job = check(*values)
                async with job.follow((request.session_hash, name)) as events:
                    yield self._buttons(running=True) | {self._status: markup.note("Starting…")}
                    async for event in events:
                        if isinstance(event, Finished):
                            updates = job.finish(event.result)
                        else:
                            yield {self._status: _status(event)}
            except JobStopped:
                updates = {self._status: markup.note("Stopped.")}
            except Exception as error:
                updates = {self._status: markup.error(message(error))}
            yield updates | self._buttons(running=False)

        def stop(request: gr.Request) -> None:
            self._worker.stop((request.session_hash, name))

        shown = [self._status, self._begin, self._stop]
        outputs = [*shown, *(one for one in outputs if one not in shown)]
        reveal = REVEAL.format(status=self._status.elem_id)
        self._begin.click(None, js=reveal, **QUICK)
        self._begin.click(run, inputs, outputs, api_name=name, **DEVICE, **PRIVATE)
        self._stop.click(stop, None, None, **QUICK)

    def _buttons(self, running: bool) -> dict[Any, Any]:
        return {
            self._begin: gr.update(interactive=not running),
            self._stop: gr.update(interactive=running),
        }


def _status(event: Queued | JobProgress | None) -> Any:
    if isinstance(event, Queued):
        return markup.queued(event)
    return gr.skip() if event is None else markup.progress(event)
