"""What the UNet calls of the last run did, for :func:`agentsd.summary`."""

from __future__ import annotations

import time
from collections import deque
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..schedule import Phase
from .step_cache import MAX_STREAMS

MAX_CALLS = 1000
"""Calls kept of a run: loops whose runs cannot be told apart may call the UNet without end."""


class CallRecord(NamedTuple):
    """What one UNet call did."""

    step: int
    """Denoising step, from 0."""
    phase: Phase
    weights: dict[int, float | Tensor] | None
    """For a light call: the weight of each earlier step's feature in the forecast; a tensor is read
    only when asked for, as reading waits for the device."""
    begun: Any
    """When it began: seconds, or a CUDA event, which does not synchronise."""


class RunLog:
    """The calls of the last run; images or batches denoised in turn have one run each."""

    def __init__(self) -> None:
        self.size: tuple[int, int] | None = None
        """Height and width of the latents."""
        self._runs: dict[object, deque[CallRecord]] = {}

    @property
    def runs(self) -> list[list[CallRecord]]:
        """The calls of each run, in order."""
        return [list(run) for run in self._runs.values()]

    def begin(self) -> None:
        """Forget the last run when another begins."""
        self._runs.clear()

    def add(
        self,
        run_id: object,
        step: int,
        phase: Phase,
        weights: dict[int, float | Tensor] | None,
        sample: Any,
    ) -> None:
        """Add a call.

        Args:
            run_id: Identifies the run among interleaved ones; None if they are not told apart.
            step: Denoising step, from 0.
            phase: The step's phase.
            weights: As for :class:`CallRecord`.
            sample: The latents.
        """
        run = self._runs.get(run_id)
        if run_id is None and (run is None or step < run[-1].step):
            self.begin()
        run = self._runs.setdefault(run_id, deque(maxlen=MAX_CALLS))
        while len(self._runs) > MAX_STREAMS:
            del self._runs[next(iter(self._runs))]
        self.size = (sample.shape[-2], sample.shape[-1])
        run.append(CallRecord(step, phase, weights, _now(sample.device)))


def seconds(run: list[CallRecord]) -> list[float | None]:
    """Seconds from the start of each call to the start of the next; None for the last.

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
