"""The images of a comparison under a divider, with their figures and the progress before them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import gradio as gr

from . import markup
from .catalog import ImageRequest
from .comparisons import Comparisons, SavedComparison
from .gallery import Gallery
from .image_controls import ImageControls
from .job_buttons import JobButtons, PageJob


class ComparisonPanel:
    """The panel's components and what they do.

    Args:
        comparisons: Makes the images.
    """

    def __init__(self, comparisons: Comparisons) -> None:
        self._comparisons = comparisons
        self.status = gr.HTML(markup.note("Press Generate, or Ctrl+Enter."), elem_id="status")
        self.last = gr.State(None)
        """The request of the images shown."""
        self._images = gr.ImageSlider(
            label="Original | agentsd",
            type="filepath",
            format="png",
            interactive=False,
            max_height=640,
            elem_id="comparison",
        )
        self._figures = gr.HTML(elem_id="figures")
        self.gallery = Gallery(comparisons)

    @property
    def outputs(self) -> list[Any]:
        """The components that :meth:`show` changes."""
        return [self._images, self._figures, self.last]

    def show(self, made: SavedComparison) -> dict[Any, Any]:
        """Updates by component that show the images of a comparison and their figures."""
        files = made.unpatched.file, made.patched.file
        label = f"Original | agentsd ({made.patched.caption})"
        return {
            self._images: gr.update(value=files, label=label),
            self._figures: markup.figures(made.figures),
            self.last: made.request,
        }

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
        buttons = JobButtons(
            self._comparisons.worker, controls.generate, controls.stop, self.status
        )
        buttons.connect(
            "generate",
            self._check,
            [*inputs, self.gallery.keys],
            [*self.outputs, *self.gallery.outputs],
        )

    def _check(self, *values: Any) -> PageJob:
        """The job that the page asks for.

        Args:
            *values: Of the page's controls, then the keys of the gallery.
        """
        *given, keys = values
        request = self._request(*given)

        def finish(made: SavedComparison) -> dict[Any, Any]:
            done = f"Done. Seed {made.request.settings.seed}."
            note = markup.note(" ".join([done, *map(markup.sentence, made.notes)]))
            return {self.status: note} | self.show(made) | self.gallery.add(made, keys)

        return PageJob(partial(self._comparisons.follow, request), finish)
