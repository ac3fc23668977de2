"""HTML for messages: the progress of a job, and the figures of a comparison."""

from __future__ import annotations

import base64
from html import escape
from io import BytesIO
from typing import Any

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


def figures(found: dict[str, Any]) -> str:
    """The figures of a comparison, the speed-up first."""
    psnr = found["psnr"]
    hidden = found["unpatched_nsfw_content_detected"] or found["nsfw_content_detected"]
    no_psnr = "not measured" if hidden else "the same image"
    cells = {
        "as fast as unpatched": f"{found['speedup']:.2f}×",
        "unpatched": f"{found['unpatched_seconds']:.1f} s",
        "patched": f"{found['seconds']:.1f} s",
        "PSNR to the unpatched image; differences above about 40 dB are hard to see": (
            no_psnr if psnr is None else f"{psnr:.1f} dB"
        ),
    }
    if "clip_score" in found:
        cells["CLIP score, unpatched → patched: how well the image matches the prompt"] = (
            f"{found['unpatched_clip_score']:.1f} → {found['clip_score']:.1f}"
        )
    items = "".join(
        f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>"
        for label, value in cells.items()
    )
    return f'<dl class="figures">{items}</dl>'
