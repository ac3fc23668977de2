"""A race as an animated GIF, to share."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from itertools import pairwise
from math import ceil
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from .race import Lane

LONGEST = 8.0
"""Maximum seconds of a race; longer ones are sped up, and the picture says so."""

HOLD = 3.0
"""Seconds that the last frame stays."""

TICK = 0.05
"""Minimum seconds between two frames; browsers slow down GIFs with less than 0.02."""

INK, PALE, TRACK, FAST, SLOW = "#18181b", "#71717a", "#e4e4e7", "#047857", "#71717a"
"""Colours: text, small text, the empty bar, the bar of the first lane, and that of the others."""


def playback_rate(seconds: float) -> int:
    """How many times as fast a race of this length is shown.

    Example:
        >>> playback_rate(5.0), playback_rate(44.0)
        (1, 6)
    """
    return max(1, ceil(seconds / LONGEST))


def race_gif(lanes: Sequence[Lane], title: str) -> bytes:
    """Draw a race as the bytes of a GIF.

    Args:
        lanes: All with frames of one size.
        title: A line above them.
    """
    end = max(lane.total for lane in lanes)
    rate = playback_rate(end)
    moments = _moments(lanes, TICK * rate)
    frames = [_draw(lanes, moment, title, rate) for moment in moments]
    spans = [(b - a) / rate for a, b in pairwise(moments)] + [HOLD]
    palette = frames[-1].quantize(160, dither=Image.Dither.NONE)
    quantized = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    data = BytesIO()
    quantized[0].save(
        data,
        format="GIF",
        save_all=True,
        append_images=quantized[1:],
        duration=[max(20, round(span * 1000)) for span in spans],
        loop=0,
        optimize=False,
    )
    return data.getvalue()


def _moments(lanes: Sequence[Lane], least: float) -> list[float]:
    """When a frame of any lane begins; moments closer together than ``least`` become one."""
    ends = sorted({0.0} | {seconds for lane in lanes for seconds in lane.seconds})
    kept = [ends[0]]
    for moment in ends[1:]:
        if moment - kept[-1] >= least:
            kept.append(moment)
    return kept if kept[-1] == ends[-1] else [*kept, ends[-1]]


def _draw(lanes: Sequence[Lane], moment: float, title: str, rate: int) -> Image.Image:
    """One frame: a title, and each lane with its image, its bar and its clock."""
    width, height = lanes[0].frames[0].size
    gap, unit = 14, max(11, width // 17)
    large, small = ImageFont.load_default(unit), ImageFont.load_default(max(10, unit - 3))
    top = 2 * gap + unit
    foot = 2 * unit + 3 * gap
    canvas = Image.new(
        "RGB", (len(lanes) * (width + gap) + gap, top + height + foot + 2 * gap), "white"
    )
    pen = ImageDraw.Draw(canvas)
    pen.text((gap, gap), _fit(title, large, canvas.width - 2 * gap), fill=INK, font=large)
    for number, lane in enumerate(lanes):
        left = gap + number * (width + gap)
        _draw_lane(canvas, lane, moment, (left, top), FAST if number == 0 else SLOW, large)
    speed = "in real time" if rate == 1 else f"shown {rate}× as fast as it ran"
    note = f"same prompt, same seed · each step when it was finished, {speed}"
    middle = canvas.width / 2, canvas.height - gap
    pen.text(middle, _fit(note, small, canvas.width - gap), fill=PALE, font=small, anchor="mm")
    return canvas


def _draw_lane(
    canvas: Image.Image,
    lane: Lane,
    moment: float,
    corner: tuple[int, int],
    colour: str,
    font: Any,
) -> None:
    pen, (left, top) = ImageDraw.Draw(canvas), corner
    width, height = lane.frames[0].size
    reached = sum(seconds <= moment for seconds in lane.seconds)
    frame = lane.frames[max(0, reached - 1)]
    canvas.paste(frame if reached else Image.new("RGB", frame.size, TRACK), corner)
    bar = top + height + 8
    pen.rounded_rectangle((left, bar, left + width, bar + 8), 4, fill=TRACK)
    share = min(1.0, moment / lane.total)
    if share > 0:
        pen.rounded_rectangle((left, bar, left + max(8, share * width), bar + 8), 4, fill=colour)
    done = moment >= lane.total
    clock = f"{min(moment, lane.total):.1f} s"
    text = top + height + 24
    pen.text((left, text), lane.label, fill=INK, font=font)
    pen.text((left + width, text), clock, fill=colour if done else PALE, font=font, anchor="ra")


def _fit(text: str, font: Any, width: float) -> str:
    text = " ".join(text.split())[:300]
    while len(text) > 1 and font.getlength(text) > width:
        text = text[:-2] + "…"
    return text
