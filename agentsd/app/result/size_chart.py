"""A chart of time against pixels, unpatched and patched, that fills in as images are made."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import sqrt
from statistics import median
from typing import NamedTuple

from .headline import speed
from .sizes import SizeEstimate

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 560, 210, 52, 22, 10, 28
"""Sizes of the drawing and of its margins."""


class Measured(NamedTuple):
    """The times of both images of a finished comparison."""

    model: str
    height: int
    width: int
    schedule: str
    steps: int
    unpatched: float
    """Seconds."""
    patched: float


def size_label(estimate: SizeEstimate) -> str:
    """The label of a size's button; ``~`` marks estimates.

    Example:
        >>> size_label(SizeEstimate(512, 512, 44.1, 9.5, 4.64))
        '512 × 512 · ~44 s → ~9.5 s'
        >>> size_label(SizeEstimate(512, 512, None, None, 4.64))
        '512 × 512 · ~4.6× faster'
    """
    name = f"{estimate.width} × {estimate.height}"
    if estimate.unpatched is not None and estimate.patched is not None:
        return f"{name} · ~{_seconds(estimate.unpatched)} → ~{_seconds(estimate.patched)}"
    return name if estimate.speedup is None else f"{name} · ~{speed(estimate.speedup)}"


def _seconds(seconds: float) -> str:
    if seconds >= 120:
        return f"{seconds / 60:.0f} min"
    return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"


def draw(estimates: Sequence[SizeEstimate], measured: Sequence[Measured]) -> str:
    """HTML of the chart.

    Args:
        estimates: At sizes along the axis, of one model, schedule and number of steps.
        measured: Comparisons of the same kind that were made.
    """
    known = [e for e in estimates if e.unpatched is not None and e.patched is not None]
    if not known and not measured:
        return (
            '<p class="chart-empty">Time against image size: make an image, and this server knows '
            "how fast it is; each further size adds its points.</p>"
        )
    most = max([e.unpatched or 0 for e in known] + [max(m.unpatched, m.patched) for m in measured])
    areas = [e.height * e.width for e in estimates] + [m.height * m.width for m in measured]
    place = _Axes(max(areas), most * 1.08)
    lines = "".join(
        f'<polyline class="{kind}" points="'
        + " ".join(
            place.text(e.height * e.width, seconds)
            for e in sorted(known, key=lambda e: e.height * e.width)
            if (seconds := e.unpatched if kind == "original" else e.patched) is not None
        )
        + '"/>'
        for kind in ("original", "ours")
    )
    dots = "".join(
        f'<circle class="{kind}" r="4.5" cx="{x:.1f}" cy="{y:.1f}"><title>{escape(title)}</title>'
        "</circle>"
        for m in measured
        for kind, seconds in (("original", m.unpatched), ("ours", m.patched))
        for x, y in [place(m.height * m.width, seconds)]
        for title in [f"{m.width} × {m.height}: {seconds:.1f} s"]
    )
    text = _summary(measured)
    return (
        f'<figure class="chart"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(text)}">{place.grid()}{_size_ticks(estimates, place)}{lines}{dots}'
        f"</svg><figcaption><span class='original'>Original</span> <span class='ours'>agentsd"
        f"</span> · dots: measured here; lines: estimated from them. {escape(text)}</figcaption>"
        "</figure>"
    )


class _Axes:
    """X by the side length, so that small sizes stay apart; y by seconds."""

    def __init__(self, most_pixels: float, most_seconds: float) -> None:
        self._right, self._top = sqrt(most_pixels), most_seconds

    def __call__(self, pixels: float, seconds: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * sqrt(pixels) / self._right
        return x, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * seconds / self._top

    def text(self, pixels: float, seconds: float) -> str:
        return ",".join(f"{value:.1f}" for value in self(pixels, seconds))

    def grid(self) -> str:
        """Lines at round numbers of seconds."""
        rough = self._top / 4
        unit = 10.0 ** (len(str(int(rough))) - 1) if rough >= 1 else 0.1
        step = next(unit * n for n in (1, 2, 5, 10, 20, 50, 100) if unit * n >= rough)
        parts = []
        value = 0.0
        while value <= self._top:
            _, y = self(0, value)
            label = f"{value:g}" if step >= 1 else f"{value:.1f}"
            parts.append(
                f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
                f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label} s</text>'
            )
            value += step
        return "".join(parts)


def _size_ticks(estimates: Sequence[SizeEstimate], place: _Axes) -> str:
    parts = []
    for estimate in estimates:
        x, _ = place(estimate.height * estimate.width, 0)
        name = (
            f"{estimate.width}²"
            if estimate.width == estimate.height
            else (f"{estimate.width}×{estimate.height}")
        )
        parts.append(
            f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{name}</text>'
        )
    return "".join(parts)


def _summary(measured: Sequence[Measured]) -> str:
    """The measured speed-up of each size, in words."""
    by_size: dict[tuple[int, int], list[float]] = {}
    for m in measured:
        by_size.setdefault((m.width, m.height), []).append(m.unpatched / m.patched)
    parts = [
        f"{width} × {height}: {median(ratios):.1f}×"
        for (width, height), ratios in sorted(by_size.items())
    ]
    return f"Measured speed-up: {', '.join(parts)}." if parts else ""
