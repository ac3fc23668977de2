"""The images of a comparison under a divider, with their figures and the progress before them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import gradio as gr

from . import markup
from .catalog import ImageRequest
from .comparisons import Comparisons, SavedComparison
from .events import DEVICE, PRIVATE, stop_button
from .gallery import Gallery
from .image_controls import ImageControls
from .page_errors import errors_in
from .worker import Finished, Progress


class ComparisonPanel:
    """The panel's components and what they do.

    Args:
        comparisons: Makes the images.
    """

    def __init__(self, comparisons: Comparisons) -> None:
        self._comparisons = comparisons
        self.status = gr.HTML(markup.note("Press Generate."), elem_id="status")
        self.last = gr.State(None)
        """The request of the images shown."""
        self._images = gr.ImageSlider(
            label="unpatched | patched",
            type="filepath",
            format="png",
            interactive=False,
            max_height=640,
            elem_id="comparison",
        )
        self._figures = gr.HTML(elem_id="figures")
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
            [*inputs, self.gallery.entries],
            [self.status, self._images, self._figures, self.last, *self.gallery.outputs],
            **DEVICE,
            **PRIVATE,
        )
        stop_button(controls.stop, self.status, run)

    async def generate(self, *values: Any) -> AsyncIterator[dict[Any, Any]]:
        """Make both images.

        Args:
            *values: Of the page's controls, then the entries of the gallery.
        """
        *given, entries = values
        request = self._request(*given)
        waiting = "Waiting for the device." if self._comparisons.busy else "…"
        yield {self.status: markup.note(waiting)}
        async with self._comparisons.follow(request) as events:
            async for event in events:
                if isinstance(event, Progress):
                    yield {self.status: markup.progress(event)}
                elif isinstance(event, Finished):
                    made: SavedComparison = event.result
                    yield {
                        self.status: markup.note("; ".join(["Done.", *made.notes])),
                        self._images: (made.unpatched.file, made.patched.file),
                        self._figures: markup.figures(made.figures),
                        self.last: request,
                    } | self.gallery.add([made.patched, made.unpatched], entries)
                else:
                    yield {self.status: gr.skip()}
