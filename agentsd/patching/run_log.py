"""What the UNet calls of the last run did, for :func:`agentsd.summary`."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from ..schedule import Phase


class CallRecord(NamedTuple):
    """What one UNet call did."""

    step: int
    """Denoising step, from 0."""
    phase: Phase
    weights: dict[int, float] | None
    """Of a light call: by earlier step, the weight that its feature has in the forecast."""
    begun: Any
    """When it began: seconds, or an event of the CUDA stream, for which nothing waits."""


class RunLog:
    """The calls of the last run, one list per image or batch that had a run of its own."""

    def __init__(self) -> None:
        self.size: tuple[int, int] | None = None
        """Height and width of the latents."""
        self._runs: dict[Any, list[CallRecord]] = {}

    @property
    def runs(self) -> list[list[CallRecord]]:
        """The calls of each run, in order."""
        return list(self._runs.values())

    def begin(self) -> None:
        """Forget the last run, as another begins."""
        self._runs.clear()

    def add(
        self, of: object, step: int, phase: Phase, weights: dict[int, float] | None, sample: Any
    ) -> None:
        """Add a call.

        Args:
            of: Tells apart runs that take turns; None where they are not told apart.
            step: Denoising step, from 0.
            phase: Its phase.
            weights: As for :class:`CallRecord`.
            sample: The latents.
        """
        run = self._runs.setdefault(of, [])
        if of is None and run and step < run[-1].step:
            run.clear()
        self.size = (sample.shape[-2], sample.shape[-1])
        run.append(CallRecord(step, phase, weights, _now(sample.device)))


def seconds(run: list[CallRecord]) -> list[float | None]:
    """Seconds from the beginning of each call to that of the next; None for the last.

    Waits for the device.
    """
    spans: list[float | None] = []
    for call, later in pairwise(run):
        if isinstance(call.begun, float):
            spans.append(later.begun - call.begun)
        else:
            later.begun.synchronize()
            spans.append(call.begun.elapsed_time(later.begun) / 1000)
    return [*spans, None]


def _now(device: torch.device) -> Any:
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
