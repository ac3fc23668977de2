"""HTML for messages and the progress of a job."""

from __future__ import annotations

import base64
from html import escape
from io import BytesIO

from PIL import Image

from .worker import Progress


def progress(event: Progress) -> str:
    """A bar with the step, the time left and, if there is one, a preview of the image."""
    left = max(1, round(event.seconds_left))
    text = escape(f"{event.label}: step {event.step} of {event.steps} · about {left} s left")
    image = "" if event.preview is None else preview(event.preview)
    return (
        f'<div class="message"><p>{text}</p>'
        f'<progress value="{event.share:.3f}" aria-label="{text}"></progress>{image}</div>'
    )


def preview(image: Image.Image) -> str:
    """A small image inside the page, which leaves no file behind."""
    data = BytesIO()
    image.save(data, format="JPEG", quality=80)
    code = base64.b64encode(data.getvalue()).decode()
    return f'<img alt="preview of the image" src="data:image/jpeg;base64,{code}">'


def note(text: str) -> str:
    """A line of text."""
    return f'<div class="message"><p>{escape(text)}</p></div>'


def error(text: str) -> str:
    """An error message."""
    return f'<div class="message message-error" role="alert"><p>{escape(text)}</p></div>'
