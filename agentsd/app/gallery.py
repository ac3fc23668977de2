"""The images made since the page was opened, and settings restored from them or from a file."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ..generation.records import ImageRecord
from ..patching.patch import DEFAULT_SCHEDULE
from ..settings import dump_yaml
from . import markup
from .catalog import ModelCatalog
from .editor import ScheduleEditor
from .events import QUICK
from .history import MAX_ENTRIES, Entry, restore
from .image_controls import ImageControls
from .page_errors import errors_in
from .phase_edits import concise
from .uploads import read_uploaded_image


class Gallery:
    """The gallery's components and what they do."""

    def __init__(self) -> None:
        self.entries = gr.State([])
        self._images = gr.Gallery(
            label="Click an image to restore its settings",
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
            label="Restore settings from a PNG of agentsd",
            file_types=[".png"],
            type="filepath",
            height=150,
            elem_id="drop",
        )

    @property
    def outputs(self) -> list[Any]:
        """The components that :meth:`add` changes."""
        return [self.entries, self._images]

    def add(self, new: list[Entry], entries: list[Entry]) -> dict[Any, Any]:
        """Updates by component that show new images before the others."""
        shown = [*new, *entries][:MAX_ENTRIES]
        images = [(entry.file, entry.caption) for entry in shown]
        return {self.entries: shown, self._images: gr.update(value=images, visible=True)}

    def connect(
        self,
        catalog: ModelCatalog,
        controls: ImageControls,
        editor: ScheduleEditor,
        status: Any,
    ) -> None:
        """Restore settings into the controls and the editor; ``status`` says so."""
        self._catalog, self._controls = catalog, controls
        self._editor, self._status = editor, status
        model = controls.by_setting["model"]
        outputs = [*controls.all, *editor.outputs, status]
        here = errors_in(status)
        self._images.select(here(self._choose), [self.entries, model], outputs, **QUICK)
        self._file.upload(here(self._read_file), [self._file, model], outputs, **QUICK)

    def _choose(self, entries: list[Entry], model: str, selected: gr.SelectData) -> dict[Any, Any]:
        index = selected.index if isinstance(selected.index, int) else -1
        if not 0 <= index < len(entries):
            return {self._status: markup.note("That image is no longer here.")}
        return self._restore(entries[index].record, model)

    def _read_file(self, path: str | None, model: str) -> dict[Any, Any]:
        if path is None:
            return {self._status: gr.skip()}
        return self._restore(read_uploaded_image(path), model)

    def _restore(self, record: ImageRecord, model: str) -> dict[Any, Any]:
        restored = restore(record, self._catalog)
        model = restored.model or model
        if restored.schedule is None:
            schedule, note = DEFAULT_SCHEDULE, " It was unpatched; the schedule is the default."
        else:
            schedule, note = dump_yaml(concise(restored.schedule)), ""
        if restored.model is None:
            note += " Its model is not available here."
        size = (restored.settings[name] for name in ("num_inference_steps", "height", "width"))
        return (
            self._controls.restore(restored.settings, restored.scheduler, model)
            | self._editor.load(schedule, model, *size)
            | {self._status: markup.note(f"Settings restored.{note}")}
        )
