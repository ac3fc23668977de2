"""What went wrong, as a visitor may see it: the message of an error of ours, and no more."""

from __future__ import annotations

import inspect
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, contextmanager
from functools import wraps
from typing import Any, TypeVar, cast

import gradio as gr

from ..errors import AgentSDError
from . import markup
from .worker import Stopped

F = TypeVar("F", bound=Callable[..., Any])

log = logging.getLogger(__name__)


def message(error: Exception) -> str:
    """What to tell of an error; one that is not ours goes to the log instead."""
    if isinstance(error, AgentSDError | gr.Error):
        return str(getattr(error, "message", error))
    if isinstance(error, Stopped):
        return "stopped: the server is closing"
    log.error("a visitor's request failed", exc_info=error)
    return "something went wrong here; the server's log says what"


@contextmanager
def told() -> Iterator[None]:
    """Tell errors to a program that called."""
    try:
        yield
    except Exception as error:
        raise gr.Error(message(error), print_exception=False) from None


def in_place(component: Any) -> Callable[[F], F]:
    """Have a handler, which returns or yields dicts by component, show its errors in one."""

    def wrap(handler: F) -> F:
        @wraps(handler)
        def shown(*values: Any) -> Any:
            try:
                return handler(*values)
            except Exception as error:
                return {component: markup.wrong(message(error))}

        @wraps(handler)
        async def followed(*values: Any) -> AsyncIterator[Any]:
            try:
                async with aclosing(handler(*values)) as found:
                    async for one in found:
                        yield one
            except Exception as error:
                yield {component: markup.wrong(message(error))}

        return cast(F, followed if inspect.isasyncgenfunction(handler) else shown)

    return wrap
