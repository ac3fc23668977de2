"""The tabs below the comparison: what the patch sees, and plots."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from itertools import chain
from typing import Any

import gradio as gr

from ..generation.prompt_encoding import warnings_for
from . import grid, markup, viewer
from .faults import in_place
from .history import keep_plain
from .limits import ModelCatalog, Request
from .worker import Finished, Progress, Worker

DEVICE = {"concurrency_limit": 1, "concurrency_id": "device"}
"""Of all that needs the device: one at a time."""

PRIVATE = {"api_visibility": "private"}
"""Of what is of use to the page alone."""

IN_FLIGHT = 0.3
"""Seconds in which what a stopped job told last reaches the page, and would cover what is told
then."""

RECORDINGS = 4
"""Kept at a time, of all visitors; the ones longest unused go."""


def see(worker: Worker, last: Any) -> None:
    """The tab that shows what a patched image's layers do.

    Args:
        worker: Runs the jobs.
        last: State with the :class:`Request` of the image made last.
    """
    recordings: OrderedDict[str, viewer.Recording] = OrderedDict()
    gr.Markdown(
        "Which tokens are merged, where the agents are, and whom each place listens to. The image "
        "is made once more to record it, so that the times above are without."
    )
    with gr.Row():
        begin = gr.Button("Look inside the last image", variant="primary", elem_id="look")
        stop = gr.Button("Stop", variant="stop")
    now = gr.HTML(elem_id="looking")
    key = gr.State("")
    with gr.Row(visible=False) as choices:
        layer = gr.Dropdown([], label="Layer", info="From the image's coarse end to its fine one.")
        step = gr.Slider(1, 2, 1, step=1, precision=0, label="Step", info="Early: large shapes.")
        view = gr.Radio(list(viewer.VIEWS), value=viewer.VIEWS[0], label="Show", elem_id="view")
    caption = gr.HTML(elem_id="seen")
    picture = gr.Image(
        label="What it sees",
        format="png",
        buttons=["download", "fullscreen"],
        interactive=False,
        visible=False,
        elem_id="overlay",
    )

    @in_place(caption)
    def show(key: str, layer: str, step: int, view: str) -> dict[Any, Any]:
        found = recordings.get(key)
        if found is None or view not in viewer.VIEWS:
            return {caption: markup.note("That recording is no longer here; look again.")}
        recordings.move_to_end(key)
        nearest = min(found.steps, key=lambda there: abs(there - step))
        seen = found.seen.get((nearest, layer))
        if seen is None:
            return {caption: markup.note("This layer does nothing of its own at this step.")}
        return {
            caption: markup.note(f"Step {nearest}: {viewer.told(seen, view)}"),
            picture: gr.update(value=viewer.overlay(found, seen, view), visible=True),
        }

    @in_place(now)
    async def look(wanted: Request | None) -> AsyncIterator[dict[Any, Any]]:
        if wanted is None:
            yield {now: markup.note("Make an image first.")}
            return
        pipe = worker.pipes[wanted.model]
        yield {now: markup.note("…")}
        async with worker.follow(lambda job: viewer.look(job, pipe, wanted)) as events:
            async for event in events:
                if isinstance(event, Progress):
                    yield {now: markup.progress(event)}
                elif isinstance(event, Finished):
                    found: viewer.Recording = event.result
                    if not found.seen:
                        yield {now: markup.note("This schedule changes no layer at this size.")}
                        return
                    name = secrets.token_hex(16)
                    recordings[name] = found
                    while len(recordings) > RECORDINGS:
                        recordings.popitem(last=False)
                    first, final = found.steps[0], found.steps[-1]
                    shown = show(name, found.layers[-1], first, viewer.VIEWS[0])
                    yield shown | {
                        now: markup.note("Recorded. Choose a layer, a step and a view."),
                        key: name,
                        choices: gr.update(visible=True),
                        layer: gr.update(
                            choices=[(short(name), name) for name in found.layers],
                            value=found.layers[-1],
                        ),
                        step: gr.update(maximum=max(final, first + 1), value=first),
                        view: viewer.VIEWS[0],
                    }
                else:
                    yield {now: gr.skip()}

    run = begin.click(
        look,
        last,
        [now, key, choices, layer, step, view, caption, picture],
        show_progress="hidden",
        **DEVICE,
        **PRIVATE,
    )
    stopping(stop, now, run)
    for control in (layer, step, view):
        control.input(
            show,
            [key, layer, step, view],
            [caption, picture],
            queue=False,
            show_progress="hidden",
            trigger_mode="always_last",
            **PRIVATE,
        )


def short(name: str) -> str:
    """A layer's name as people say it.

    Example:
        >>> short("up_blocks.3.attentions.1.transformer_blocks.0.attn1")
        'up block 3, attention 1, part 0'
    """
    words = {"_blocks": " block", "attentions": "attention", "transformer block": "part"}
    text = name.removesuffix(".attn1")
    for long, plain in words.items():
        text = text.replace(long, plain)
    return ", ".join(re.sub(r"\.(\d+)", r" \1", text).split("."))


def plot(
    worker: Worker,
    catalog: ModelCatalog,
    folder: str,
    asked: list[Any],
    request: Callable[..., Request],
) -> None:
    """The tab that makes X/Y plots.

    Args:
        worker: Runs the jobs.
        catalog: What may be asked for.
        folder: Where pictures are written.
        asked: The controls that tell what is the same for all images.
        request: Reads their values.
    """
    gr.Markdown(
        "One image for each pair of values, all else as above. Values stand with commas between. "
        f"At most {catalog.limits.max_images} images; each takes the time of one."
    )
    axes = []
    with gr.Row():
        for label, name in (("X, across", "schedule"), ("Y, down", "seed")):
            axis = gr.Dropdown(
                list(grid.AXES),
                value=name,
                label=label,
                info="ratio and those after it change every phase that reads them.",
            )
            values = gr.Textbox(
                grid.AXES[name].example, label=f"{label.partition(',')[0]} values", max_length=500
            )
            axis.input(
                lambda name: grid.AXES[name].example if name in grid.AXES else "",
                axis,
                values,
                queue=False,
                show_progress="hidden",
                **PRIVATE,
            )
            axes += [axis, values]
    with gr.Row():
        begin = gr.Button("Plot", variant="primary", elem_id="plot")
        stop = gr.Button("Stop", variant="stop")
    now = gr.HTML(elem_id="plotting")
    picture = gr.Image(
        label="Plot",
        type="filepath",
        format="png",
        buttons=["download", "fullscreen"],
        interactive=False,
        elem_id="plotted",
    )

    @in_place(now)
    async def make(*values: Any) -> AsyncIterator[dict[Any, Any]]:
        *given, x, xs, y, ys = values
        wanted = request(*given)
        planned = grid.plan(catalog, wanted, (x, xs), (y, ys))
        pipe, prompt = worker.pipes[wanted.model], wanted.settings.prompt
        yield {now: markup.note("…")}
        async with worker.follow(
            lambda job: grid.make(job, pipe, planned, prompt), len(planned.cells)
        ) as events:
            async for event in events:
                if isinstance(event, Progress):
                    yield {now: markup.progress(event)}
                elif isinstance(event, Finished):
                    file = keep_plain(folder, event.result, "agentsd-plot.png")
                    cells = [cell.settings for cell in planned.cells]
                    missed = dict.fromkeys(chain(*(warnings_for(pipe, one) for one in cells)))
                    yield {now: markup.note("; ".join(["Done.", *missed])), picture: file}
                else:
                    yield {now: gr.skip()}

    run = begin.click(
        make, [*asked, *axes], [now, picture], show_progress="hidden", **DEVICE, **PRIVATE
    )
    stopping(stop, now, run)


def stopping(button: Any, now: Any, run: Any) -> None:
    """Have a button stop a running job."""

    async def tell() -> str:
        await asyncio.sleep(IN_FLIGHT)
        return markup.note("Stopped.")

    quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", **PRIVATE}
    stopped = button.click(lambda: None, cancels=[run], **quick)
    stopped.then(tell, None, now, **quick)
