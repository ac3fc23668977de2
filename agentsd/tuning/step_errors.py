"""Predict a candidate's error from the errors of its single steps.

Errors are measured along an unpatched trajectory: each step is computed as in the candidate's run,
but from the latents of the unpatched run, and compared with the output of the unpatched UNet. How
far an error in one step moves the final image is measured at a few steps, by continuing the run
with that error. The error of a candidate is the weighted sum of its steps' errors as vectors, since
errors of one kind add up and others cancel.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from numpy.typing import NDArray
from torch import Tensor

from ..attributes import replaced_attribute
from ..patching.forecasts import forecast, has_light_steps, usable
from ..patching.light_steps import OUTPUT
from ..patching.step_cache import MAX_FEATURES, Feature
from ..schedule import Phase
from .candidates import Candidate, schedule_of
from .probing import BRANCHES, Probe
from .trajectories import Trajectory

VALUES = 4096
"""Size of the random sample of values that represents a prediction."""

Vector = NDArray[np.float32]
Source = tuple[int, int]
"""The number of a call that was computed in full, and the index of its attention setting."""


class StepErrors:
    """Errors of single steps on one trajectory; results are cached.

    Args:
        probe: Runs single steps of the trajectory's pipeline.
        trajectory: An unpatched run of the pipeline.
        weights: How far an error of 1 (root mean square) in the prediction of each call moves the
            final image.
    """

    def __init__(self, probe: Probe, trajectory: Trajectory, weights: NDArray[np.float64]) -> None:
        self._probe, self._trajectory, self._weights = probe, trajectory, weights
        reference = trajectory.guided(trajectory.calls[0].output).flatten()
        order = np.random.default_rng(0).permutation(len(reference))
        self._drawn = torch.from_numpy(order[:VALUES])
        self._features: dict[tuple[int, Source], Tensor] = {}
        self._errors: dict[tuple[Any, ...], Vector] = {}

    def predict(self, candidate: Candidate) -> float:
        """Predicted root mean square difference from the unpatched image, for pixels in [0, 1]."""
        total = np.zeros(len(self._drawn), np.float32)
        for weight, error in zip(self._weights, self._step_errors(candidate), strict=True):
            total += weight * error
        return float(np.sqrt(np.mean(np.square(total))))

    def _step_errors(self, candidate: Candidate) -> Iterator[Vector]:
        """The error of each call, assuming that all others are unpatched."""
        calls = self._trajectory.calls
        num_steps = calls[0].position.num_steps
        schedule = schedule_of(candidate, num_steps)
        attention = {
            id(phase): segment.attention
            for phase, segment in zip(schedule.phases, candidate, strict=True)
        }
        known: dict[int, list[tuple[Feature, Source]]] = defaultdict(list)
        calls_of: Counter[int] = Counter()
        for number, call in enumerate(calls):
            step = call.position.step
            phase = schedule.phase_at(step, num_steps)
            source = number, attention[id(phase)]
            earlier = known[calls_of[step]]
            if not has_light_steps(phase, num_steps):
                known.clear()
                yield self._whole(source)
            else:
                error = self._light(source, phase, earlier[-MAX_FEATURES:])
                if error is None:
                    assert phase.cache is not None
                    value = self._feature(source, phase.cache.branch)
                    earlier.append((Feature(step, phase, value), source))
                    error = self._whole(source)
                yield error
            calls_of[step] += 1

    def _whole(self, source: Source) -> Vector:
        if source not in self._errors:
            self._errors[source] = self._error(source[0], self._feature(source, OUTPUT))
        return self._errors[source]

    def _light(
        self, source: Source, phase: Phase, known: list[tuple[Feature, Source]]
    ) -> Vector | None:
        """The error of a light step; ``None`` if the step is computed in full."""
        number, attention = source
        assert phase.cache is not None
        call, branch, order = self._trajectory.calls[number], phase.cache.branch, phase.cache.order
        step, num_steps, _ = call.position
        sources = {id(feature): source for feature, source in known}
        features = usable([feature for feature, _ in known], phase, step, num_steps)
        if not features:
            return None
        attended = attention if branch != OUTPUT else None
        key = number, attended, branch, order, *(sources[id(f)] for f in features)
        if key not in self._errors:
            value = forecast(features, step).value
            output = (
                value if branch == OUTPUT else self._probe.light(call, attention, branch, value)
            )
            self._errors[key] = self._error(number, output)
        return self._errors[key]

    def _error(self, number: int, output: Tensor) -> Vector:
        call, guided = self._trajectory.calls[number], self._trajectory.guided
        error = guided(output.float()) - guided(call.output.float())
        sample: Vector = error.flatten()[self._drawn].numpy()
        return sample

    def _feature(self, source: Source, branch: int) -> Tensor:
        """What a whole step caches for later ones: its deep feature, or its output."""
        if (branch, source) not in self._features:
            number, attention = source
            call = self._trajectory.calls[number]
            for known in BRANCHES:
                output, feature = self._probe.whole(call, attention, known)
                self._features |= {(OUTPUT, source): output, (known, source): feature}
        return self._features[branch, source]


def weights_of_steps(
    trajectory: Trajectory,
    pipe: DiffusionPipeline,
    draw: Callable[[], NDArray[np.float64]],
    *,
    places: int = 5,
) -> NDArray[np.float64]:
    """How far an error of 1 in the prediction of each call moves the image.

    It is measured at a few calls, with the error of a linear forecast of the output, and
    interpolated between them. Earlier calls are replayed, not recomputed.

    Args:
        trajectory: A run of the pipeline, of at least three calls.
        pipe: An unpatched pipeline.
        draw: Runs the pipeline with the trajectory's settings; returns the image ``[H, W, 3]`` in
            [0, 1].
        places: Number of calls at which to measure.

    Returns:
        A weight for each call.
    """
    calls = trajectory.calls
    with _replayed(pipe, trajectory, len(calls), None):
        reference = draw()
    at = np.unique(np.linspace(2, len(calls) - 1, places).round().astype(int))
    log_weights = []
    for place in at:
        before, last, now = (calls[i].output.float() for i in (place - 2, place - 1, place))
        error = 2 * last - before - now
        with _replayed(pipe, trajectory, int(place), error):
            moved_by = np.sqrt(np.mean(np.square(draw() - reference)))
        size = trajectory.guided(error).square().mean().sqrt()
        log_weights.append(np.log(max(float(moved_by), 1e-9) / max(float(size), 1e-9)))
    return np.exp(np.interp(np.arange(len(calls)), at, log_weights))


@contextmanager
def _replayed(
    pipe: DiffusionPipeline, trajectory: Trajectory, place: int, error: Tensor | None
) -> Iterator[None]:
    """Replay the UNet's outputs up to ``place``, adding the error there, then compute as usual."""
    unet, number = pipe.unet, -1
    forward = unet.forward

    def replay(*args: Any, **kwargs: Any) -> Any:
        nonlocal number
        number += 1
        if number > place or number >= len(trajectory.calls):
            return forward(*args, **kwargs)
        output = trajectory.calls[number].output
        if number == place and error is not None:
            output = (output.float() + error).to(output.dtype)
        return (output.to(pipe._execution_device),)

    with replaced_attribute(unet, "forward", replay):
        yield
