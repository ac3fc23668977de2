"""The schedule editor: phases as rows of controls, as YAML, and drawn over the steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import gradio as gr

from ...errors import AgentSDError, ScheduleError, SettingsError
from ...settings import dump_yaml
from ..components import markup
from ..components.events import EACH, LATEST, QUICK, on_choice
from ..components.page_errors import errors_in
from ..requests.schedule_library import ScheduleLibrary
from ..requests.schedule_text import CUSTOM, MAX_YAML, read_schedule
from ..requests.uploads import read_uploaded_text
from .phase_borders import SCRIPT, move_border
from .phase_controls import PhaseControls
from .phase_edits import (
    add_phase,
    as_python,
    concise,
    edit_phase,
    method_name,
    read_phases,
    remove_phase,
    switch_method,
    with_phases,
)

ROWS = 4
"""Phases with a row of controls; YAML may have more."""

Updates = dict[Any, Any]
"""New values by component."""

DOWNLOAD = """(text) => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], {type: "application/yaml"}));
  link.download = "schedule.yaml";
  link.click();
  URL.revokeObjectURL(link.href);
}"""


class ScheduleEditor:
    """The editor's components and what they do.

    Args:
        preset: The page's choice of a preset.
        image: The page's controls of model, steps, height and width, which a timeline depends on.
        message: Says what is wrong with these.
        draw: Draws a timeline: ``(schedule, model, steps, height, width)`` to HTML.
        library: The schedules to choose from.
    """

    def __init__(
        self,
        preset: Any,
        image: list[Any],
        message: Any,
        draw: Callable[..., str],
        library: ScheduleLibrary,
    ) -> None:
        self._preset, self._image, self._draw, self._library = preset, image, draw, library
        self._image_message = message
        with gr.Column(elem_id="timeline"):
            self._message = gr.HTML(elem_id="schedule-message")
            self._timeline = gr.HTML(js_on_load=SCRIPT)
        with gr.Accordion("Advanced: the parameters of each phase", open=False):
            self._rows = [PhaseControls(number) for number in range(ROWS)]
        with gr.Row():
            self._add = gr.Button("Add a phase", size="sm", elem_id="add-phase")
            self._upload = gr.UploadButton(
                "Upload YAML", file_types=[".yaml", ".yml"], type="filepath", size="sm"
            )
            self._download = gr.Button("Download YAML", size="sm")
        with gr.Row():
            self.yaml = gr.Textbox(
                label="The same schedule as YAML, which has more parameters than the controls",
                elem_id="yaml",
                min_width=320,
                lines=12,
                max_length=MAX_YAML,
                html_attributes=gr.InputHTMLAttributes(spellcheck=False),
            )
            self._python = gr.Textbox(
                label="As Python, to copy",
                elem_id="python",
                min_width=320,
                lines=12,
                max_lines=12,
                interactive=False,
                buttons=["copy"],
            )
        # Text boxes do not report pasting or deleting as input, so every change has to be looked
        # at, and the text that the editor wrote last is kept to tell its own changes apart.
        self._written = gr.State("")
        self._connect()
        self._show_at_start()

    @property
    def outputs(self) -> list[Any]:
        """The components that :meth:`load` changes."""
        messages = [self._message, self._image_message]
        own = [*messages, self.yaml, self._written, self._timeline, self._python, self._preset]
        own.append(self._add)
        return own + [component for row in self._rows for component in row.outputs]

    def load(self, text: str, *image: Any) -> Updates:
        """Show a schedule.

        Args:
            text: The name of a schedule of the library, or YAML.
            *image: Model, steps, height and width.

        Raises:
            ScheduleError: If the schedule is not valid.
        """
        text = self._library.text(text) if text in self._library else text
        values = concise(read_schedule(text))
        return self._write(dump_yaml(values), *image) | self._show_rows(values["phases"])

    def _write(self, text: str, *image: Any) -> Updates:
        return {self.yaml: text, self._written: text} | self._view(text, *image)

    def _view(self, text: str, *image: Any) -> Updates:
        """The timeline of a schedule's text, or what is wrong with it or with the image.

        In that case the last timeline stays, so that the message does not move the controls.
        """
        clear = {self._message: "", self._image_message: ""}
        try:
            schedule = read_schedule(text)
        except AgentSDError as error:
            wrong = markup.error(f"{error}\nThe timeline is that of the last valid schedule.")
            return clear | {self._message: wrong, self._python: "", self._preset: CUSTOM}
        valid = clear | {
            self._python: as_python(schedule),
            self._preset: self._library.name_of(schedule),
        }
        try:
            return valid | {self._timeline: self._draw(schedule, *image)}
        except SettingsError as error:
            return valid | {self._image_message: markup.error(str(error))}
        except AgentSDError as error:
            return valid | {self._message: markup.error(str(error))}

    def _show_rows(self, phases: list[dict[str, Any]], values: bool = True) -> Updates:
        """The controls of phases; none if there are more phases than rows."""
        count = len(phases) if len(phases) <= ROWS else 0
        updates: Updates = {}
        for number, row in enumerate(self._rows):
            phase = phases[number] if number < count else None
            updates |= row.update(phase, number == count - 1, values, only=count == 1)
        return updates | {self._add: gr.update(interactive=0 < count < ROWS)}

    def _change_text(self, text: str, written: str, *image: Any) -> Updates:
        """Follow a change of the text, which is not changed itself."""
        updates = self._view(text, *image)
        if text == written:
            return updates
        try:
            return updates | self._show_rows(read_phases(text))
        except ScheduleError:
            return updates

    def _choose_preset(self, name: str, text: str, *image: Any) -> Updates:
        return self.load(text if name == CUSTOM else name, *image)

    def _load_file(self, path: str, *image: Any) -> Updates:
        return self.load(read_uploaded_text(path), *image)

    def _rewrite(self, text: str, phases: list[dict[str, Any]], *image: Any) -> Updates:
        """The text with other phases; it stays as it is if they are the same."""
        if phases == read_phases(text):
            return self._view(text, *image)
        return self._write(with_phases(text, phases), *image)

    def _edit_row(self, number: int, text: str, *values: Any) -> Updates:
        phases = read_phases(text)
        image, given = values[: len(self._image)], values[len(self._image) :]
        if number >= len(phases):
            raise ScheduleError(f"there is no phase {number + 1}")
        last, edits = number == len(phases) - 1, self._rows[number].values(given)
        is_switch = edits["method"] != method_name(phases[number])
        edit = switch_method if is_switch else edit_phase
        phases[number] = edit(phases[number], edits, last)
        return self._rewrite(text, phases, *image) | self._show_rows(phases, values=is_switch)

    def _remove_row(self, number: int, text: str, *image: Any) -> Updates:
        phases = read_phases(text)
        if len(phases) < 2 or number >= len(phases):
            raise ScheduleError("a schedule needs at least one phase")
        rest = remove_phase(phases, number)
        return self._rewrite(text, rest, *image) | self._show_rows(rest)

    def _add_row(self, text: str, *image: Any) -> Updates:
        phases = read_phases(text)
        if len(phases) >= ROWS:
            raise ScheduleError(f"there are controls for {ROWS} phases; add more in the YAML")
        phases = add_phase(phases)
        return self._rewrite(text, phases, *image) | self._show_rows(phases)

    def _move_border(
        self, text: str, model: str, steps: int, height: int, width: int, moved: gr.EventData
    ) -> Updates:
        """Follow a moved border of the timeline."""
        to = moved._data if isinstance(moved._data, dict) else {}
        phases = move_border(read_phases(text), to.get("phase"), to.get("step"), steps)
        return self._rewrite(text, phases, model, steps, height, width) | self._show_rows(phases)

    def _connect(self) -> None:
        here = errors_in(self._message)
        source = [self.yaml, *self._image]
        changed = [self.yaml, self._written, *self._image]
        self.yaml.change(here(self._change_text), changed, self.outputs, **EACH)
        self._preset.input(
            here(self._choose_preset), [self._preset, *source], self.outputs, **QUICK
        )
        move = here(self._move_border)
        self._timeline.input(move, source, self.outputs, **QUICK)
        self._add.click(here(self._add_row), source, self.outputs, **QUICK)
        self._upload.upload(
            here(self._load_file), [self._upload, *self._image], self.outputs, **QUICK
        )
        self._download.click(None, self.yaml, None, js=DOWNLOAD, api_visibility="private")
        for number, row in enumerate(self._rows):
            remove = here(partial(self._remove_row, number))
            row.remove.click(remove, source, self.outputs, **QUICK)
            edit = here(partial(self._edit_row, number))
            for control in row.inputs:
                if isinstance(control, gr.Dropdown):
                    on_choice(control, edit, [*source, *row.inputs], self.outputs)
                else:
                    control.input(edit, [*source, *row.inputs], self.outputs, **LATEST)
        for control in self._image:
            control.change(here(self._view), source, self.outputs, **EACH)

    def _show_at_start(self) -> None:
        updates = self.load(self._preset.value, *(control.value for control in self._image))
        for component, value in updates.items():
            changes = value if isinstance(value, dict) else {"value": value}
            for name in changes.keys() & {"value", "visible", "info", "interactive"}:
                setattr(component, name, changes[name])
