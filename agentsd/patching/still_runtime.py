"""UNet calls out of order: each at a step that is set before it."""

from __future__ import annotations

from typing import Any

from .runtime import Runtime


class StillRuntime(Runtime):
    """Stays at the ``step`` that it is given, whatever the UNet is called with."""

    def follow(self, *_: Any) -> None:
        return None

    def finish(self, *_: Any) -> None:
        return None
