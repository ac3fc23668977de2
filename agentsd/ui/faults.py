"""What went wrong, as a visitor may see it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape

import gradio as gr

from ..errors import AgentSDError

log = logging.getLogger(__name__)


@contextmanager
def told() -> Iterator[None]:
    """Show errors of ours as their message, and of others that there was one."""
    try:
        yield
    except AgentSDError as error:
        # gradio shows messages as HTML.
        raise gr.Error(escape(str(error), quote=False), print_exception=False) from None
    except gr.Error:
        raise
    except Exception as error:
        log.exception("a visitor's request failed")
        raise gr.Error(
            "something went wrong here; the server's log says what", print_exception=False
        ) from error
