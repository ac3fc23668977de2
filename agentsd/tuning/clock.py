"""The time limit of tuning, its progress, and how it is stopped."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple


class TuningProgress(NamedTuple):
    """Progress of tuning."""

    stage: str
    seconds: float
    """Seconds since tuning began."""
    limit: float
    """Time limit in seconds."""
    best: str
    """Short description of the best schedule so far; empty before there is one."""


class TuningStopped(Exception):  # noqa: N818  # not an error: tuning ends with the best so far
    """Tuning was asked to stop."""


class OutOfTime(Exception):  # noqa: N818
    """A stage has used up its time."""


class Clock:
    """Keeps time for tuning and reports its progress.

    Args:
        minutes: Time limit.
        progress: Called with the progress.
        cancelled: Called often; returns whether to stop.
    """

    def __init__(
        self,
        minutes: float,
        progress: Callable[[TuningProgress], None],
        cancelled: Callable[[], bool],
    ) -> None:
        self._progress, self._cancelled = progress, cancelled
        self._begun = time.monotonic()
        self.limit = 60 * minutes
        self.reserved = 0.0
        """Seconds reserved for later stages."""
        self.stage = ""
        self.best = ""
        self._stage_ends = self.limit

    @property
    def seconds(self) -> float:
        """Seconds since tuning began."""
        return time.monotonic() - self._begun

    @property
    def left(self) -> float:
        """Seconds left, not counting those reserved."""
        return self.limit - self.reserved - self.seconds

    def begin(self, stage: str, share: float | None = 1.0) -> None:
        """Begin a stage.

        Args:
            stage: Its name.
            share: Share of the time left that it may use; ``None`` sets no limit.
        """
        self.stage = stage
        self._stage_ends = float("inf") if share is None else self.seconds + share * self.left
        self.check()

    def check(self) -> None:
        """Report the progress.

        Raises:
            TuningStopped: If tuning was asked to stop.
        """
        self._progress(TuningProgress(self.stage, self.seconds, self.limit, self.best))
        if self._cancelled():
            raise TuningStopped

    def goes_on(self) -> bool:
        """Whether the stage has time left; also does what :meth:`check` does."""
        self.check()
        return self.seconds < self._stage_ends

    def check_stage(self) -> None:
        """Like :meth:`check`, but also end the stage when its time is up.

        Raises:
            OutOfTime: If the stage has no time left.
        """
        if not self.goes_on():
            raise OutOfTime
