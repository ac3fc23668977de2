"""How the page's events are wired: which of them run at once, and which are real choices."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import gradio as gr

PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
"""Options of events that are for the page only, which shows progress itself."""

QUICK: dict[str, Any] = {"queue": False, **PRIVATE}
"""Options of events that do not wait for the device."""

EACH: dict[str, Any] = {"trigger_mode": "multiple", **QUICK}
"""Options of events that come in quick succession, and are all answered."""

LATEST: dict[str, Any] = {"trigger_mode": "always_last", **QUICK}
"""Options of events that come in quick succession, where only the last one matters.

For at most one handler of an event: when one has waited for its turn, gradio calls all handlers of
the event again, so that two of them keep each other going forever. It is also gradio's default for
changes.
"""

DEVICE: dict[str, Any] = {"concurrency_limit": None}
"""Options of events that need the device; they wait in the worker's queue, not in gradio's, which
cannot tell the page's visitors their place."""

REMEMBER = "(value) => {{ (window.agentsdChoices ??= {{}})[{key}] = value; }}"
"""Notes the value of a dropdown that is about to be used."""

CHOSEN = """(value, ...rest) => {{
  const before = (window.agentsdChoices ??= {{}});
  const same = (before[{key}] ?? {start}) === value;
  before[{key}] = value;
  return [same ? null : value, ...rest];
}}"""
"""Sends ``null`` for a dropdown that was left as it was."""


def on_choice(
    dropdown: gr.Dropdown, handler: Callable[..., Any], inputs: list[Any], outputs: list[Any]
) -> None:
    """Follow a visitor's choice of another value.

    Gradio reports input also when a dropdown only loses the focus, as it does on a way through the
    page with Tab, and once more after each choice.

    Args:
        dropdown: The dropdown.
        handler: Called with the values of ``inputs``.
        inputs: As for an event of gradio.
        outputs: As for an event of gradio.
    """

    def choose(value: Any, *values: Any) -> Any:
        return handler(*values) if value is not None else {outputs[0]: gr.skip()}

    key, start = dropdown._id, json.dumps(dropdown.value)
    dropdown.focus(None, dropdown, None, js=REMEMBER.format(key=key), **QUICK)
    js = CHOSEN.format(key=key, start=start)
    dropdown.input(choose, [dropdown, *inputs], outputs, js=js, **LATEST)
