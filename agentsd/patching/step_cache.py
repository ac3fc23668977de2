"""What outlives a UNet call: features of earlier steps of the same run, and nothing else."""

from __future__ import annotations

import weakref
from typing import NamedTuple

from torch import Tensor

from ..schedule import Phase
from .denoising_step import Call

MOST = 3
"""Features that a forecast takes at most."""


class Feature(NamedTuple):
    """The deep feature of a step that was computed whole."""

    step: int
    phase: Phase
    value: Tensor


class StepCache:
    """Features of one run, by the number of the call within its step.

    A run is one list of timesteps, gone through in order, on latents of one shape, type and
    device. Each call must be the next of the list. Where a list entry comes again, it is the same
    step only with the same latents (classifier-free guidance in two calls); otherwise it is
    another image's. Whatever does not go on with a run starts a new one, with an empty cache, so
    that nothing of an image, finished or interrupted, reaches another.

    It holds at most three features for each call of a step, until the run's last call, the
    next run or :meth:`clear`.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget the run, and free what it held."""
        self._call: Call | None = None
        self._step = self._number = -1
        self._latents: weakref.ref[Tensor] | None = None
        self._kind: object = None
        self._features: dict[int, list[Feature]] = {}

    def begin(self, call: Call, step: int, latents: Tensor) -> None:
        """Take note of a UNet call; what came before is kept only if this call goes on with it.

        Args:
            call: Its place in the list of timesteps.
            step: The denoising step that it belongs to.
            latents: What the UNet is called with.
        """
        kind = (latents.shape, latents.dtype, latents.device)
        last = self._call
        repeated = last is not None and call.place == last.place
        goes_on = (
            last is not None
            and kind == self._kind
            and call.is_of_the_same_list_as(last)
            and (call.place == last.place + 1 or repeated)
        )
        if repeated and (self._latents is None or self._latents() is not latents):
            goes_on = False
        if not goes_on:
            self.clear()
        self._number = self._number + 1 if goes_on and step == self._step else 0
        self._call, self._step, self._kind = call, step, kind
        self._latents = weakref.ref(latents)

    def get(self) -> list[Feature]:
        """The features of like calls of earlier steps, the oldest first."""
        return self._features.get(self._number, [])

    def put(self, phase: Phase, value: Tensor) -> None:
        """Keep a feature of this call, and of those before it as many as a forecast takes."""
        # A copy: a compiled UNet may return memory that its next call writes over.
        found = Feature(self._step, phase, value.clone())
        self._features[self._number] = [*self.get(), found][-MOST:]

    def end(self) -> None:
        """Free all of it after the last call of a run."""
        if self._call is not None and self._call.place == self._call.length - 1:
            self._features.clear()
