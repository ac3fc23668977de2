"""The settings in the page's address, where they survive a reload and can be shared."""

from __future__ import annotations

import json
from typing import Any

import gradio as gr

from ..components.events import EACH, QUICK
from ..components.page_errors import errors_in
from ..controls.image_controls import RANDOM_SEED, ImageControls
from ..requests.schedule_text import CUSTOM
from .restorer import Restorer

READ = "() => [location.hash.slice(1)]"
"""The part after ``#``, which browsers do not send, so that prompts appear in no log."""

WRITE = """(preset, yaml, ...values) => {
  if (!window.agentsdRestored) return;
  const names = NAMES, usual = USUAL, link = new URLSearchParams();
  names.forEach((name, i) => {
    if (values[i] !== usual[i]) link.set(name, values[i] ?? RANDOM);
  });
  if (preset !== PRESET) link.set("schedule", preset === CUSTOM ? yaml : preset);
  const hash = link.toString();
  history.replaceState(null, "", location.pathname + location.search + (hash && "#" + hash));
}"""
"""Writes the settings that differ from the defaults."""


def follow_settings(
    page: gr.Blocks, restorer: Restorer, controls: ImageControls, yaml: Any
) -> None:
    """Restore the settings of the page's address when it opens, then keep the address up to date.

    Args:
        page: The page.
        restorer: Restores settings.
        controls: The controls.
        yaml: The text of the schedule.
    """
    address = gr.Textbox(visible=False)
    restore = errors_in(restorer.status)(restorer.from_link)
    restored = page.load(restore, address, restorer.outputs, js=READ, **QUICK)
    restored.then(None, None, None, js="() => { window.agentsdRestored = true; }", **QUICK)
    values = {
        "NAMES": list(controls.linked),
        "USUAL": [control.value for control in controls.linked.values()],
        "RANDOM": str(RANDOM_SEED),
        "PRESET": controls.preset.value,
        "CUSTOM": CUSTOM,
    }
    js = WRITE
    for name, value in values.items():
        js = js.replace(name, json.dumps(value))
    inputs = [controls.preset, yaml, *controls.linked.values()]
    gr.on([control.change for control in inputs], None, inputs, None, js=js, **EACH)
