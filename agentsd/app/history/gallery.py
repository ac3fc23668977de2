"""The images made in this browser, and settings restored from them or from a file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from ..components import markup
from ..components.events import QUICK
from ..components.page_errors import errors_in
from ..requests.uploads import read_uploaded_image
from ..result.comparisons import Comparisons, SavedComparison, starting_image
from .restorer import Restorer

MAX_ENTRIES = 12
"""Comparisons in a visitor's gallery; the oldest go first."""


class Gallery:
    """The gallery's components and what they do.

    Args:
        comparisons: Those that were made.
    """

    def __init__(self, comparisons: Comparisons) -> None:
        self._comparisons = comparisons
        # In the browser, so that it survives a reload. The secret hides nothing: keys of
        # comparisons that the visitor made.
        self.keys = gr.BrowserState([], storage_key="agentsd-history", secret="agentsd")
        """Of the comparisons, the newest first."""
        self._images = gr.Gallery(
            label="This session: click an image to reuse its settings",
            format="png",
            columns=6,
            fit_columns=False,
            height="auto",
            interactive=False,
            allow_preview=False,
            elem_id="gallery",
            visible=False,
        )
        self._file = gr.File(
            label="Reuse the settings of an agentsd PNG",
            file_types=[".png"],
            type="filepath",
            height=150,
            elem_id="drop",
        )

    @property
    def outputs(self) -> list[Any]:
        """The components that :meth:`add` changes."""
        return [self.keys, self._images]

    def add(self, made: Sequence[SavedComparison], keys: Any) -> dict[Any, Any]:
        """Updates by component that show new comparisons before the others."""
        return self._show([*reversed(made), *self._load(keys)])

    def _load(self, keys: Any) -> list[SavedComparison]:
        """The comparisons that a browser remembers, as far as they still exist."""
        given = keys[:MAX_ENTRIES] if isinstance(keys, list) else []
        found = (self._comparisons.load(key) for key in given)
        return [made for made in found if made is not None]

    def _show(self, comparisons: list[SavedComparison]) -> dict[Any, Any]:
        shown = comparisons[:MAX_ENTRIES]
        images = [
            (entry.file, entry.caption)
            for made in shown
            for entry in (made.patched, made.unpatched)
        ]
        return {
            self.keys: [made.key for made in shown],
            self._images: gr.update(value=images, visible=bool(images)),
        }

    def connect(
        self,
        page: gr.Blocks,
        restorer: Restorer,
        show: Callable[[Sequence[SavedComparison]], dict[Any, Any]],
        shown: list[Any],
    ) -> None:
        """Restore the gallery when the page opens, and from it a comparison when it is clicked.

        Args:
            page: The page.
            restorer: Restores settings.
            show: Updates by component that show comparisons.
            shown: The components that it changes.
        """
        self._restorer, self._show_again = restorer, show
        page.load(lambda keys: self._show(self._load(keys)), self.keys, self.outputs, **QUICK)
        outputs = [*restorer.outputs, *shown]
        here = errors_in(restorer.status)
        self._images.select(here(self._choose), [self.keys, restorer.model], outputs, **QUICK)
        self._file.upload(
            here(self._read_file), [self._file, restorer.model], restorer.outputs, **QUICK
        )

    def _choose(self, keys: Any, model: str, selected: gr.SelectData) -> dict[Any, Any]:
        index = selected.index if isinstance(selected.index, int) else -1
        found = self._load(keys)
        if not 0 <= index < 2 * len(found):
            return {self._restorer.status: markup.note("That image is no longer here.")}
        made = found[index // 2]
        start = starting_image(Path(made.patched.file).parent)
        restored = self._restorer.from_record(made.patched.record, model, start)
        return restored | self._show_again([made])

    def _read_file(self, path: str | None, model: str) -> dict[Any, Any]:
        if path is None:
            return {self._restorer.status: gr.skip()}
        return self._restorer.from_record(read_uploaded_image(path), model)
