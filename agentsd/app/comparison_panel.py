"""The images and figures of a comparison, and its progress beforehand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import gradio as gr

from .components import markup
from .components.job_buttons import JobButtons, PageJob
from .controls.image_controls import ImageControls
from .controls.size_choice import SizeChoice
from .history.gallery import Gallery
from .requests.catalog import ImageRequest
from .result import difference_views, headline
from .result.comparisons import Comparisons, SavedComparison
from .result.race_button import RaceButton


class ComparisonPanel:
    """The panel's components and what they do.

    Args:
        comparisons: Makes the images.
        sizes: Keeps the measurements, and draws its chart here.
        folder: Where files are written.
    """

    def __init__(self, comparisons: Comparisons, sizes: SizeChoice, folder: str) -> None:
        self._comparisons, self._sizes = comparisons, sizes
        self.status = gr.HTML(markup.note("Press Generate, or Ctrl+Enter."), elem_id="status")
        self.last = gr.State(None)
        """The request of the images shown."""
        self._figures = gr.HTML(elem_id="figures")
        self._images = difference_views.difference_views()
        self._race = RaceButton(folder)
        sizes.add_chart()
        self.gallery = Gallery(comparisons)

    @property
    def outputs(self) -> list[Any]:
        """The components that :meth:`show` changes."""
        return [self._images, self._figures, self.last, *self._race.outputs]

    def show(self, made: Sequence[SavedComparison]) -> dict[Any, Any]:
        """Updates by component that show a request's comparisons, one per seed."""
        request, label = made[0].request, made[0].pair.patched.label
        pairs = [one.pair for one in made]
        return {
            self._images: difference_views.draw(pairs),
            self._figures: headline.draw([one.figures for one in made], label),
            self.last: request,
            **self._race.show(request.settings.prompt, pairs),
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
            [*inputs, self._sizes.measured, self.gallery.keys],
            [*self.outputs, self._sizes.measured, *self.gallery.outputs],
        )

    def _check(self, *values: Any) -> PageJob:
        """The job that the page requests.

        Args:
            *values: Of the page's controls, then the visitor's measurements and the keys of the
                gallery.
        """
        *given, measured, keys = values
        request = self._request(*given)

        def finish(made: list[SavedComparison]) -> dict[Any, Any]:
            return {
                self.status: markup.note(_done(request, made)),
                **self.show(made),
                **self._sizes.add(made, measured),
                **self.gallery.add(made, keys),
            }

        return PageJob(partial(self._comparisons.follow, request), finish)


def _done(request: ImageRequest, made: Sequence[SavedComparison]) -> str:
    """What was made, and what a visitor should know about it."""
    seeds = [one.request.settings.seed for one in made]
    shown = f"Seed {seeds[0]}." if len(seeds) == 1 else f"Seeds {seeds[0]} to {seeds[-1]}."
    complete = len(made) == request.images
    state = "Done." if complete else f"Stopped after {len(made)} of {request.images} seeds."
    notes = dict.fromkeys(note for one in made for note in one.notes)
    return " ".join([state, shown, *map(markup.sentence, notes)])
