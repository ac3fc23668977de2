"""Show errors to visitors: our own messages, and of any other error only that it happened."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, contextmanager
from functools import wraps
from typing import Any, TypeVar, cast

import gradio as gr

from ...errors import AgentSDError
from ..jobs.job import JobStopped
from . import markup

F = TypeVar("F", bound=Callable[..., Any])

log = logging.getLogger(__name__)

FOLDERS = re.compile(r"(?<![\w./:])/(?:[^\s/:'\"]+/)+")
"""The folders of an absolute path, which are nobody's business."""


def message(error: Exception) -> str:
    """What a visitor may read of an error, with names of files but no folders.

    Any error that is not ours is logged instead.
    """
    if isinstance(error, AgentSDError | gr.Error):
        return FOLDERS.sub("", str(getattr(error, "message", error)))
    if isinstance(error, JobStopped):
        return "stopped: the server is closing"
    log.error("a visitor's request failed", exc_info=error)
    return "unexpected error; the server's log has the details"


@contextmanager
def api_errors() -> Iterator[None]:
    """Pass errors on to a program that called the API."""
    try:
        yield
    except Exception as error:
        raise gr.Error(message(error), print_exception=False) from None


def errors_in(component: Any) -> Callable[[F], F]:
    """Decorate a handler that returns or yields dicts by component: its errors show in one."""

    def decorate(handler: F) -> F:
        @wraps(handler)
        def handle(*values: Any) -> Any:
            try:
                return handler(*values)
            except Exception as error:
                return {component: markup.error(message(error))}

        @wraps(handler)
        async def follow(*values: Any) -> AsyncIterator[Any]:
            try:
                async with aclosing(handler(*values)) as updates:
                    async for update in updates:
                        yield update
            except Exception as error:
                yield {component: markup.error(message(error))}

        return cast(F, follow if inspect.isasyncgenfunction(handler) else handle)

    return decorate
