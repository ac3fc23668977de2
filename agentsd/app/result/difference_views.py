"""Both images in one frame: under a divider, side by side, in turns, their difference, a race."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import gradio as gr

MODES = {
    "slider": "Slider",
    "side": "Side by side",
    "flicker": "Flicker",
    "difference": "Difference × 10",
    "race": "Race",
}
"""Ways to compare two images."""

SCRIPT = Path(__file__).with_name("difference_views.js").read_text(encoding="utf-8")


class Runner(NamedTuple):
    """One image of a pair."""

    label: str
    file: str
    """Path of the image."""
    frames: str
    """Path of a sheet of the frames of the race."""
    times: list[float]
    """When each frame is reached, in seconds."""


class Pair(NamedTuple):
    """The original and the patched image of one seed."""

    seed: int
    original: Runner
    patched: Runner
    size: tuple[int, int]
    """Width and height, in pixels."""
    columns: int
    """Frames per row of the sheets."""


def difference_views() -> gr.HTML:
    """The component; its value is what :func:`draw` returns."""
    return gr.HTML(_empty(), js_on_load=SCRIPT, elem_id="comparison", apply_default_css=False)


def address(file: str) -> str:
    """Where the page finds a file of its folder, relative to the page."""
    return f"gradio_api/file={quote(file)}"


def draw(pairs: Sequence[Pair], shown: int = 0) -> str:
    """HTML of the views of pairs, one of which is shown at first."""
    pair = pairs[shown]
    width, height = pair.size
    modes = "".join(
        f'<button type="button" role="tab" data-mode="{mode}" '
        f'aria-selected="{str(mode == "slider").lower()}">{escape(name)}</button>'
        for mode, name in MODES.items()
    )
    images = "".join(
        f'<figure class="{kind}"><img alt="{escape(runner.label)}" draggable="false" '
        f'src="{address(runner.file)}"><figcaption>{escape(runner.label)}</figcaption></figure>'
        for kind, runner in (("original", pair.original), ("ours", pair.patched))
    )
    data = escape(json.dumps([_data(each) for each in pairs]))
    return (
        f'<div class="views" data-mode="slider" data-key="{escape(pair.patched.file)}" '
        f'data-pairs="{data}" style="--ratio:{width}/{height}">'
        f'<div class="view-bar"><div class="modes" role="tablist" aria-label="View">{modes}</div>'
        '<div class="zoom"><button type="button" data-zoom="out" aria-label="Zoom out">−</button>'
        '<output>1×</output><button type="button" data-zoom="in" aria-label="Zoom in">+</button>'
        f'</div></div><div class="stage">{images}<div class="rule" aria-hidden="true"></div></div>'
        '<input class="divider" type="range" min="0" max="100" step="0.5" value="50" '
        'aria-label="Divider between the original and the agentsd image">'
        f"{_race_lanes(pair)}{_seeds(pairs, shown)}"
        f'<p class="downloads">Download: {_downloads(pair)}</p></div>'
    )


def _empty() -> str:
    return '<div class="views views-empty" aria-hidden="true"><div class="stage"></div></div>'


def _data(pair: Pair) -> dict[str, object]:
    runners = (("original", pair.original), ("ours", pair.patched))
    return {
        "seed": pair.seed,
        "columns": pair.columns,
        **{
            kind: {
                "label": runner.label,
                "src": address(runner.file),
                "name": Path(runner.file).name,
                "frames": address(runner.frames),
                "times": [round(seconds, 4) for seconds in runner.times],
            }
            for kind, runner in runners
        },
    }


def _race_lanes(pair: Pair) -> str:
    lanes = "".join(
        f'<div class="lane {kind}"><div class="film"></div><div class="track"><i></i></div>'
        f"<p><span>{escape(runner.label)}</span><b>0.0 s</b></p></div>"
        for kind, runner in (("ours", pair.patched), ("original", pair.original))
    )
    return (
        f'<div class="race">{lanes}<div class="replay"><button type="button" class="again">'
        '▶ Replay</button><small class="rate"></small></div></div>'
    )


def _seeds(pairs: Sequence[Pair], shown: int) -> str:
    if len(pairs) < 2:
        return ""
    buttons = "".join(
        f'<button type="button" data-pair="{number}" aria-pressed="{str(number == shown).lower()}">'
        f'<img alt="" src="{address(pair.patched.file)}">seed {pair.seed}</button>'
        for number, pair in enumerate(pairs)
    )
    return f'<div class="seeds" role="group" aria-label="Seeds">{buttons}</div>'


def _downloads(pair: Pair) -> str:
    return " · ".join(
        f'<a class="{kind}" download="{escape(Path(runner.file).name)}" '
        f'href="{address(runner.file)}">{escape(runner.label)}</a>'
        for kind, runner in (("original", pair.original), ("ours", pair.patched))
    )
