"""HTML for messages and the progress of a job."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from html import escape
from io import BytesIO

from PIL import Image

from ..jobs.job import JobProgress
from ..jobs.worker import Queued


def progress(event: JobProgress) -> str:
    """A bar with the step, the time left and, if there is one, a preview of the image."""
    step = f": step {event.step} of {event.steps}" if event.step else ""
    text = escape(f"{event.label}{step}{_left(event.seconds_left)}")
    image = "" if event.preview is None else preview(event.preview)
    return (
        f'<div class="message" aria-live="off"><p>{text}</p>'
        f'<progress value="{event.share:.3f}" aria-label="{text}"></progress>{image}</div>'
    )


def _left(seconds: float | None) -> str:
    return "" if seconds is None else f" · about {max(1, round(seconds))} s left"


def queued(event: Queued) -> str:
    """How many requests come first, and for how long."""
    first = "1 request comes" if event.place == 1 else f"{event.place} requests come"
    wait = "" if event.seconds is None else f" · about {max(1, round(event.seconds))} s"
    return note(f"Waiting: {first} before yours{wait}")


def preview(image: Image.Image) -> str:
    """A small image inside the page, which leaves no file behind."""
    data = BytesIO()
    image.save(data, format="JPEG", quality=80)
    code = base64.b64encode(data.getvalue()).decode()
    return f'<img alt="preview of the image" src="data:image/jpeg;base64,{code}">'


def note(text: str) -> str:
    """A line of text."""
    return notes([text])


def notes(texts: Iterable[str]) -> str:
    """Several lines of text."""
    return f'<div class="message">{"".join(f"<p>{escape(text)}</p>" for text in texts)}</div>'


def sentence(text: str) -> str:
    """A remark as a sentence of its own."""
    return f"{text[:1].upper()}{text[1:]}."


def error(text: str) -> str:
    """An error message."""
    return f'<div class="message message-error" role="alert"><p>{escape(text)}</p></div>'
