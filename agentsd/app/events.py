"""How the page's events are wired: what waits for the device, and how a job is stopped."""

from __future__ import annotations

import asyncio
from typing import Any

from . import markup

PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
"""Options of events that are for the page only, which shows progress itself."""

QUICK: dict[str, Any] = {"queue": False, **PRIVATE}
"""Options of events that do not wait for the device."""

LATEST: dict[str, Any] = {"trigger_mode": "always_last", **QUICK}
"""Options of events that come in quick succession, where only the last one matters."""

DEVICE: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "device"}
"""Options of events that need the device: one at a time."""

IN_FLIGHT = 0.3
"""Seconds that a stopped job's last update takes to the page, where it would hide "Stopped."."""


def stop_button(button: Any, status: Any, run: Any) -> None:
    """Make a button stop a running job, and say so."""

    async def report() -> str:
        await asyncio.sleep(IN_FLIGHT)
        return markup.note("Stopped.")

    stopped = button.click(lambda: None, cancels=[run], **QUICK)
    stopped.then(report, None, status, **QUICK)
