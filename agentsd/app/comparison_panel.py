"""The images of a comparison under a divider, with their figures and the progress before them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import gradio as gr

from . import difference_views, headline, markup
from .catalog import ImageRequest
from .comparisons import Comparisons, SavedComparison
from .editor import CUSTOM
from .events import DEVICE, PRIVATE, stop_button
from .gallery import Gallery
from .image_controls import ImageControls
from .page_errors import errors_in
from .race_button import RaceButton
from .schedule_library import ScheduleLibrary
from .size_choice import SizeChoice
from .worker import Finished, Progress


class ComparisonPanel:
    """The panel's components and what they do.

    Args:
        comparisons: Makes the images.
        sizes: Keeps what was measured, and draws its chart here.
        library: Names of schedules.
        folder: Where files are written.
    """

    def __init__(
        self,
        comparisons: Comparisons,
        sizes: SizeChoice,
        library: ScheduleLibrary,
        folder: str,
    ) -> None:
        self._comparisons, self._sizes, self._library = comparisons, sizes, library
        self.status = gr.HTML(markup.note("Press Generate."), elem_id="status")
        self.last = gr.State(None)
        """The request of the images shown."""
        self._figures = gr.HTML(elem_id="figures")
        self._images = difference_views.difference_views()
        self._race = RaceButton(folder)
        sizes.add_chart()
        self.gallery = Gallery()

    def connect(
        self, controls: ImageControls, inputs: list[Any], request: Callable[..., ImageRequest]
    ) -> None:
        """Follow the buttons.

        Args:
            controls: The buttons.
            inputs: The controls and the schedule.
            request: Reads the values of ``inputs``.
        """
        self._request = request
        run = controls.generate.click(
            errors_in(self.status)(self.generate),
            [*inputs, self._sizes.measured, self.gallery.entries],
            [
                self.status,
                self._images,
                self._figures,
                self.last,
                self._sizes.measured,
                *self._race.outputs,
                *self.gallery.outputs,
            ],
            **DEVICE,
            **PRIVATE,
        )
        stop_button(controls.stop, self.status, run)

    async def generate(self, *values: Any) -> AsyncIterator[dict[Any, Any]]:
        """Make both images.

        Args:
            *values: Of the page's controls, then the visitor's measurements and the entries of the
                gallery.
        """
        *given, measured, entries = values
        request = self._request(*given)
        waiting = "Waiting for the device." if self._comparisons.busy else "…"
        yield {self.status: markup.note(waiting)}
        name = self._library.name_of(request.schedule) or CUSTOM
        async with self._comparisons.follow(request, name) as events:
            async for event in events:
                if isinstance(event, Progress):
                    yield {self.status: markup.progress(event)}
                elif isinstance(event, Finished):
                    yield self._show(request, name, event.result, measured, entries)
                else:
                    yield {self.status: gr.skip()}

    def _show(
        self,
        request: ImageRequest,
        name: str,
        made: list[SavedComparison],
        measured: list[Any],
        entries: list[Any],
    ) -> dict[Any, Any]:
        """Updates by component that show finished comparisons."""
        notes = dict.fromkeys(note for one in made for note in one.notes)
        pairs = [one.pair for one in made]
        new = [entry for one in made for entry in (one.patched, one.unpatched)]
        return {
            self.status: markup.note("; ".join(["Done.", *notes])),
            self._images: difference_views.draw(pairs),
            self._figures: headline.draw([one.figures for one in made], name),
            self.last: request,
            **self._sizes.add(request, made, measured),
            **self._race.show(request.settings.prompt, pairs),
            **self.gallery.add(new, entries),
        }
