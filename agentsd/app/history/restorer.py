"""Settings put back into the page's controls: from the record of an image, or from a link."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl

import gradio as gr

from ...errors import SettingsError
from ...generation.records import ImageRecord
from ...image_settings import ImageSettings
from ...patching.patch import DEFAULT_SCHEDULE
from ...settings import dump_yaml, short_repr
from ..components import markup
from ..controls.image_controls import ImageControls
from ..editor.editor import ScheduleEditor
from ..editor.phase_edits import concise
from ..requests.catalog import ModelCatalog
from .restored_settings import restore


class Restorer:
    """Restores settings into the controls and the editor.

    Args:
        catalog: What visitors can ask for.
        controls: The controls.
        editor: The editor.
        status: Says what was restored, and what was not.
    """

    def __init__(
        self, catalog: ModelCatalog, controls: ImageControls, editor: ScheduleEditor, status: Any
    ) -> None:
        self._catalog, self._controls, self._editor = catalog, controls, editor
        self.status = status
        self.model = controls.by_setting["model"]

    @property
    def outputs(self) -> list[Any]:
        """The components that it changes."""
        return [*self._controls.all, *self._editor.outputs, self.status]

    def from_record(
        self, record: ImageRecord, model: str, init_image: str | None = None
    ) -> dict[Any, Any]:
        """Updates by component that show the settings of an image.

        Args:
            record: The image's record.
            model: The model that is chosen now, which stays if that of the image is not here.
            init_image: The file of its initial image, if that still exists.

        Raises:
            SettingsError: If its settings cannot be used.
        """
        found = restore(record, self._catalog, init_image)
        notes = [*found.notes]
        if found.schedule is None:
            notes.append("It was made without agentsd; the schedule is the default.")
        schedule = (
            DEFAULT_SCHEDULE if found.schedule is None else dump_yaml(concise(found.schedule))
        )
        return self._show(found.settings, found.scheduler, found.model or model, schedule, notes)

    def from_link(self, link: str) -> dict[Any, Any]:
        """Updates by component that show the settings of the page's address.

        Args:
            link: What follows ``#``: settings as in a query, those that differ from the defaults.

        Raises:
            SettingsError: If one cannot be used.
            ScheduleError: If the schedule cannot be used.
        """
        given = dict(parse_qsl(link, keep_blank_values=True))
        if not given:
            return {self.status: gr.skip()}
        chosen = {name: control.value for name, control in self._controls.linked.items()}
        for name in given.keys() & chosen.keys():
            chosen[name] = _read(name, given[name], type(chosen[name]))
        model, scheduler = chosen.pop("model"), chosen.pop("scheduler")
        # A link may leave the prompt empty, and the seed random.
        placeholders = {"prompt": chosen["prompt"] or "-", "seed": max(0, chosen["seed"])}
        known = {name: chosen[name] for name in ImageSettings.model_fields}
        settings, notes = self._catalog.limits.fit(ImageSettings(**known | placeholders))
        shown = chosen | settings.model_dump() | {name: chosen[name] for name in placeholders}
        notes += self._controls.fit_options(shown)
        if model not in self._catalog.sizes:
            notes.append(f"The model {model} is not available here.")
            model = self.model.value
        schedule = given.get("schedule", DEFAULT_SCHEDULE)
        return self._show(shown, scheduler, model, schedule, notes)

    def _show(
        self,
        settings: Mapping[str, Any],
        scheduler: str,
        model: str,
        schedule: str,
        notes: list[str],
    ) -> dict[Any, Any]:
        size = (settings[name] for name in ("num_inference_steps", "height", "width"))
        return (
            self._controls.restore(settings, scheduler, model)
            | self._editor.load(schedule, model, *size)
            | {self.status: markup.note(" ".join(["Settings restored.", *notes]))}
        )


def _read(name: str, text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise SettingsError(f"the link's {name} is not a number (got {short_repr(text)})") from None
