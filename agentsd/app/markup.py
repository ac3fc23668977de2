"""HTML of what the page tells: how far a job is, and what came of it."""

from __future__ import annotations

import base64
from html import escape
from io import BytesIO
from typing import Any

from PIL import Image

from .worker import Progress


def progress(now: Progress) -> str:
    """A bar with the step, the time left and, where there is one, the image as it stands."""
    left = max(1, round(now.seconds_left))
    told = f"{now.label}: step {now.step} of {now.steps} · about {left} s left"
    image = "" if now.preview is None else preview(now.preview)
    return (
        f'<div class="told"><p>{escape(told)}</p>'
        f'<progress value="{now.share:.3f}" aria-label="{escape(told)}"></progress>{image}</div>'
    )


def preview(image: Image.Image) -> str:
    """A small image as part of the page, so that no file is left of it."""
    data = BytesIO()
    image.save(data, format="JPEG", quality=80)
    code = base64.b64encode(data.getvalue()).decode()
    return f'<img alt="the image so far" src="data:image/jpeg;base64,{code}">'


def note(text: str) -> str:
    """A line of text."""
    return f'<div class="told"><p>{escape(text)}</p></div>'


def wrong(text: str) -> str:
    """What is wrong with what was typed."""
    return f'<div class="told wrong" role="alert"><p>{escape(text)}</p></div>'


def figures(found: dict[str, Any]) -> str:
    """What a comparison found, the speed-up first."""
    psnr = found["psnr"]
    hidden = found["unpatched_nsfw_content_detected"] or found["nsfw_content_detected"]
    equal = "not measured" if hidden else "the same image"
    alike = equal if psnr is None else f"{psnr:.1f} dB"
    cells = {
        f"{found['speedup']:.2f}×": "as fast as unpatched",
        f"{found['unpatched_seconds']:.1f} s": "unpatched",
        f"{found['seconds']:.1f} s ": "patched",
        alike: "PSNR to the unpatched image; above about 40, hard to see",
    }
    if "clip_score" in found:
        scores = f"{found['unpatched_clip_score']:.1f} → {found['clip_score']:.1f}"
        cells[scores] = "CLIP score, unpatched → patched: how well the prompt is met"
    told = "".join(
        f"<div><dt>{escape(why)}</dt><dd>{escape(n)}</dd></div>" for n, why in cells.items()
    )
    return f'<dl class="figures">{told}</dl>'
