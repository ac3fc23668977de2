"""The result in one line: how much faster, and how close; the other figures below it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from statistics import fmean, median
from typing import Any

from ..components import markup

CLOSENESS = (
    (50.0, "visually identical"),
    (40.0, "differences are hard to see"),
    (30.0, "small differences"),
)
"""What a PSNR, from this many dB on, means visually."""

HIDDEN = ("unpatched_nsfw_content_detected", "nsfw_content_detected")
"""Figures that say whether a safety checker hid an image."""

UNCHANGED = (
    "The schedule changes nothing at this size and number of steps, so both images are the same "
    "and no time is saved. Choose a larger size, more steps or another schedule."
)

VISIBLE = "visible differences"

NO_GAIN = 1.05
"""A speed-up below this, or a slowdown above its inverse, may be measurement noise."""


def closeness(found: dict[str, Any]) -> str:
    """How close a patched image is to the original one, in words."""
    if any(found[name] for name in HIDDEN):
        return "not compared: hidden by the safety checker"
    if found["psnr"] is None:
        return "exactly the same image"
    return next((words for least, words in CLOSENESS if found["psnr"] >= least), VISIBLE)


def speed(ratio: float) -> str:
    """A speed-up with one decimal, if it is significant.

    Example:
        >>> speed(4.631), speed(0.98)
        ('4.6× faster', 'about as fast')
    """
    if ratio < 1 / NO_GAIN:
        return f"{1 / ratio:.1f}× slower"
    return f"{ratio:.1f}× faster" if ratio >= NO_GAIN else "about as fast"


def draw(found: Sequence[dict[str, Any]], patched: str) -> str:
    """HTML of a headline, two time bars and details; no speed-up where nothing was changed.

    Args:
        found: The figures of each seed's comparison.
        patched: What the patched image is called.
    """
    if all(figures["unchanged"] for figures in found):
        return markup.note(UNCHANGED)
    slow = fmean(figures["unpatched_seconds"] for figures in found)
    fast = fmean(figures["seconds"] for figures in found)
    words = closeness(min(found, key=lambda f: 999.0 if f["psnr"] is None else f["psnr"]))
    times = f"{slow:.1f} s → {fast:.1f} s"
    many = f" · mean of {len(found)} seeds" if len(found) > 1 else ""
    longest = max(slow, fast)
    bars = "".join(
        f'<div class="time {kind}"><span>{escape(name)}</span>'
        f'<i style="--share:{seconds / longest:.4f}"></i><b>{seconds:.1f} s</b></div>'
        for kind, name, seconds in (
            ("original", "Original", slow),
            ("ours", patched, fast),
        )
    )
    return (
        f'<div class="headline" role="status"><p><strong>{escape(speed(slow / fast))}</strong>'
        f"<span>{escape(times)}</span><span>{escape(words + many)}</span></p>{bars}"
        f"<details><summary>Details</summary>{details(found)}</details></div>"
    )


def details(found: Sequence[dict[str, Any]]) -> str:
    """The figures behind a headline."""
    rows = [("Similarity (PSNR)", _psnr(found), "Above 40 dB, differences are hard to see.")]
    if "clip_score" in found[0]:
        before, after = (
            fmean(f[name] for f in found) for name in ("unpatched_clip_score", "clip_score")
        )
        rows.append(
            (
                "Prompt match (CLIP)",
                f"{before:.1f} → {after:.1f}",
                "Original → agentsd. Higher: the image shows more of what the prompt asks for.",
            )
        )
    ratios = [f["unpatched_seconds"] / f["seconds"] for f in found]
    spread = f" ({min(ratios):.1f} to {max(ratios):.1f})" if len(found) > 1 else ""
    rows.append(
        (
            "Speed-up",
            f"{median(ratios):.1f}×{spread}",
            "Measured once for each seed, text encoder and decoder included.",
        )
    )
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd><small>{escape(note)}</small></div>"
        for name, value, note in rows
    )
    return f'<dl class="figures">{items}</dl>'


def _psnr(found: Sequence[dict[str, Any]]) -> str:
    values = [f["psnr"] for f in found if f["psnr"] is not None]
    if not values:
        hidden = any(f[name] for f in found for name in HIDDEN)
        return "not measured" if hidden else "the same image"
    low, high = min(values), max(values)
    return f"{low:.1f} dB" if len(values) == 1 else f"{low:.1f} to {high:.1f} dB"
