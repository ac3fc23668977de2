"""How the page's events are wired: which run concurrently, and which are real choices."""

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
"""Options of events in quick succession that are all handled."""

LATEST: dict[str, Any] = {"trigger_mode": "always_last", **QUICK}
"""Options of events in quick succession, of which only the last one matters.

Use it for at most one handler of an event: after one has waited, gradio calls all handlers of the
event again, so two of them would trigger each other forever. It is also gradio's default for
changes.
"""

DEVICE: dict[str, Any] = {"concurrency_limit": None}
"""Options of events that need the device; they wait in the worker's queue, not in gradio's, which
cannot tell the page's visitors their place."""

REMEMBER = "(value) => {{ (window.agentsdChoices ??= {{}})[{key}] = value; }}"
"""Remembers the value of a dropdown that is about to be used."""

CHOSEN = """(value, ...rest) => {{
  const before = (window.agentsdChoices ??= {{}});
  const same = (before[{key}] ?? {start}) === value;
  before[{key}] = value;
  return [same ? null : value, ...rest];
}}"""
"""Sends ``null`` for a dropdown whose value did not change."""


def on_choice(
    dropdown: gr.Dropdown, handler: Callable[..., Any], inputs: list[Any], outputs: list[Any]
) -> None:
    """Follow a visitor's choice of another value.

    Gradio also reports input when a dropdown merely loses the focus, such as when tabbing through
    the page, and once more after each choice.

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
