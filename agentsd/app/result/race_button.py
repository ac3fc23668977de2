"""The button that saves the race of the images shown as a GIF."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr
from PIL import Image

from ...errors import GenerationError
from ...generation.image_files import write_whole
from ..components import markup
from ..components.events import PRIVATE
from ..components.page_errors import errors_in
from .difference_views import Pair, Runner, address
from .race import Lane, frame_size
from .race_gif import race_gif
from .saved_files import new_folder

CHOSEN = """(...values) => {
  const chosen = document.querySelector("#comparison [data-pair][aria-pressed=true]");
  return [...values.slice(0, -1), Number(chosen?.dataset.pair ?? 0)];
}"""
"""Sends which seed is shown, as the last value."""

SAVE = """() => document.querySelector("#race-link a")?.click()"""


class RaceButton:
    """The button and the link to the file that it makes.

    Args:
        folder: Where files are written.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self.pairs = gr.State([])
        """The pairs that are shown, and the prompt before them."""
        self.button = gr.Button(
            "Save the race as GIF", size="sm", elem_id="save-race", visible=False
        )
        self._link = gr.HTML(elem_id="race-link", visible=False)
        shown = gr.Number(0, visible=False, precision=0)
        made = self.button.click(
            errors_in(self._link)(self._make),
            [self.pairs, shown],
            [self._link],
            js=CHOSEN,
            concurrency_limit=2,
            **PRIVATE,
        )
        made.success(None, None, None, js=SAVE)

    @property
    def outputs(self) -> list[Any]:
        """The components that :meth:`show` changes."""
        return [self.pairs, self.button, self._link]

    def show(self, prompt: str, pairs: list[Pair]) -> dict[Any, Any]:
        """Updates by component once images are shown."""
        return {
            self.pairs: [prompt, *pairs],
            self.button: gr.update(visible=True),
            self._link: gr.update(value="", visible=False),
        }

    def _make(self, shown: Sequence[Any], number: int) -> dict[Any, Any]:
        if not shown:
            return {self._link: markup.note("Make an image first.")}
        prompt, *pairs = shown
        pair: Pair = pairs[number if 0 <= number < len(pairs) else 0]
        lanes = [read_lane(runner, pair.columns) for runner in (pair.patched, pair.original)]
        name = f"agentsd-{pair.seed}-race.gif"
        file = new_folder(self._folder) / name
        write_whole(file, race_gif(lanes, prompt))
        link = f'<p><a download="{name}" href="{address(str(file))}">{name}</a></p>'
        return {self._link: gr.update(value=link, visible=True)}


def read_lane(runner: Runner, columns: int) -> Lane:
    """The frames of a runner, from the files that the page has of it.

    Raises:
        GenerationError: If they were deleted, as happens after some hours.
    """
    try:
        with Image.open(runner.file) as image, Image.open(runner.frames) as sheet:
            width, height = frame_size(image)
            count = len(runner.times)
            corners = [(n % columns * width, n // columns * height) for n in range(count)]
            frames = [sheet.crop((x, y, x + width, y + height)).convert("RGB") for x, y in corners]
    except OSError:
        raise GenerationError("the images are no longer on the server; make them again") from None
    return Lane(runner.label, runner.times, frames)
