"""The error that each choice makes in a single step, and what these errors add up to.

Everything happens along an unpatched trajectory: a step is computed as a candidate would, from the
latents that the unpatched run had there, and compared with what the unpatched UNet returned. How
much an error in one step moves the final image is measured too, at a few steps: the run goes on
from there with the error in it. The error of a whole candidate is then predicted as the sum of its
steps' errors, each times that weight, as vectors, so that errors of a kind add up and others cancel.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from diffusers import DiffusionPipeline
from numpy.typing import NDArray
from torch import Tensor

from ..patching.deep_features import Feature, forecast, without_deep_residuals
from ..patching.patch import apply_patch, install, patch_of, remove_patch
from ..patching.still_runtime import StillRuntime
from ..patching.step_cache import MOST
from ..schedule import Phase, Schedule
from .candidates import ATTENTION, CACHES, Candidate, schedule_of
from .trajectories import Trajectory, moved

OUTPUT = -1
"""The branch that forecasts the output."""

BRANCHES = sorted({cache.get("cache_branch", OUTPUT) for cache in CACHES} - {OUTPUT})

VALUES = 4096
"""Values of a prediction, drawn once, that stand for all of them."""

Vector = NDArray[np.float32]
Source = tuple[int, int]
"""A call that was computed whole, and with which attention."""


class StepErrors:
    """Errors of single steps on one trajectory; what was computed once is remembered.

    Args:
        pipe: Unpatched, except within :meth:`probing`.
        trajectory: Of the pipeline.
        weights: How far an error of 1 (root mean square) in the prediction of each call moves the
            final image.
        check: Called before each call of the UNet; may raise to stop.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        trajectory: Trajectory,
        weights: NDArray[np.float64],
        check: Callable[[], None],
    ) -> None:
        self._pipe, self._trajectory, self._check = pipe, trajectory, check
        self._weights = weights
        reference = trajectory.guided(trajectory.calls[0].output).flatten()
        order = np.random.default_rng(0).permutation(len(reference))
        self._drawn = torch.from_numpy(order[:VALUES])
        self._features: dict[tuple[int, Source], Tensor] = {}
        self._errors: dict[tuple[Any, ...], Vector] = {}
        self._runtime: StillRuntime | None = None

    @contextmanager
    def probing(self) -> Iterator[None]:
        """Let the UNet be called step by step, until the end of the ``with`` block."""
        kinds = [
            attention | {"cache_interval": 2, "cache_branch": branch}
            for attention in ATTENTION
            for branch in BRANCHES
        ]
        ends = [{"until_step": number} for number in range(1, len(kinds))]
        schedule = Schedule(phases=[a | b for a, b in zip(kinds, [*ends, {}], strict=True)])
        unet = self._pipe.unet
        apply_patch(self._pipe, schedule)
        patch = patch_of(unet)
        assert patch is not None
        self._runtime = StillRuntime(schedule, patch.runtime.layers)
        remove_patch(self._pipe)
        install(unet, self._runtime)
        try:
            with torch.inference_mode():
                yield
        finally:
            self._runtime = None
            remove_patch(self._pipe)

    def predict(self, candidate: Candidate) -> float:
        """The predicted difference to the unpatched image: root mean square, of pixels in [0, 1].

        Within :meth:`probing` only.
        """
        total = np.zeros(len(self._drawn), np.float32)
        for weight, error in zip(self._weights, self._step_errors(candidate), strict=True):
            total += weight * error
        return float(np.sqrt(np.mean(np.square(total))))

    def _step_errors(self, candidate: Candidate) -> Iterator[Vector]:
        """The error of each call, were the others those of the unpatched run."""
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
            if phase.cache_interval == 1:
                known.clear()
                yield self._whole(source)
            else:
                light = self._light(source, phase, earlier[-MOST:])
                if light is None:
                    value = self._feature(source, phase.cache_branch)
                    earlier.append((Feature(step, phase, value), source))
                    light = self._whole(source)
                yield light
            calls_of[step] += 1

    def _whole(self, source: Source) -> Vector:
        if source not in self._errors:
            self._errors[source] = self._error(source[0], self._feature(source, OUTPUT))
        return self._errors[source]

    def _light(
        self, source: Source, phase: Phase, known: list[tuple[Feature, Source]]
    ) -> Vector | None:
        """The error of a light step; None where the step is computed whole."""
        number, attention = source
        step = self._trajectory.calls[number].position.step
        branch = phase.cache_branch
        sources = tuple(each for _, each in known)
        kept = sources, tuple(f.phase is phase for f, _ in known), phase.cache_interval
        attended = attention if branch != OUTPUT else None
        key = number, attended, branch, phase.cache_order, kept
        if key not in self._errors:
            value = forecast([feature for feature, _ in known], phase, step)
            if value is None:
                return None
            if branch != OUTPUT:
                value = self._call(source, branch, value)
            self._errors[key] = self._error(number, value)
        return self._errors[key]

    def _error(self, number: int, output: Tensor) -> Vector:
        call, guided = self._trajectory.calls[number], self._trajectory.guided
        error = guided(output.float()) - guided(call.output.float())
        found: Vector = error.flatten()[self._drawn].numpy()
        return found

    def _feature(self, source: Source, branch: int) -> Tensor:
        """What a whole step leaves for later ones: its deep feature, or its output."""
        if (branch, source) not in self._features:
            for each in BRANCHES:
                output = self._call(source, each)
                self._features[OUTPUT, source] = output
        return self._features[branch, source]

    def _call(self, source: Source, branch: int, feature: Tensor | None = None) -> Tensor:
        """The UNet's output, on the CPU: of a whole step, or of a light one on a feature."""
        self._check()
        number, attention = source
        call, runtime = self._trajectory.calls[number], self._runtime
        assert runtime is not None
        phase = runtime.schedule.phases[attention * len(BRANCHES) + BRANCHES.index(branch)]
        device = self._pipe._execution_device
        arguments = moved(call.arguments, device) | {"return_dict": False}
        step = runtime.step_at(call.position, phase, *call.latents.shape[-2:], device)
        if feature is None:
            runtime.step = replace(step, records=branch)
        else:
            runtime.step = replace(step, forecast=feature.to(device))
            arguments = without_deep_residuals(arguments, branch)
        output: Tensor = self._pipe.unet(**arguments)[0]
        if feature is None:
            self._features[branch, source] = runtime.step.features["deep"].cpu()
        return output.cpu()


def weights_of_steps(
    trajectory: Trajectory,
    pipe: DiffusionPipeline,
    draw: Callable[[], NDArray[np.float64]],
    *,
    places: int = 5,
) -> NDArray[np.float64]:
    """How far an error of 1 in the prediction of each call moves the image.

    It is measured at a few calls, with the error of a linear forecast of the output, and drawn out
    between them. The calls before are not computed again.

    Args:
        trajectory: Of the pipeline; of at least three calls.
        pipe: Unpatched.
        draw: Makes the trajectory's image with the pipeline: ``[H, W, 3]`` in [0, 1].
        places: Number of calls at which to measure.

    Returns:
        One for each call.
    """
    calls = trajectory.calls
    with _replayed(pipe, trajectory, len(calls), None):
        reference = draw()
    at = np.unique(np.linspace(2, len(calls) - 1, places).round().astype(int))
    found = []
    for place in at:
        before, last, now = (calls[i].output.float() for i in (place - 2, place - 1, place))
        error = 2 * last - before - now
        with _replayed(pipe, trajectory, int(place), error):
            moved_by = np.sqrt(np.mean(np.square(draw() - reference)))
        size = trajectory.guided(error).square().mean().sqrt()
        found.append(np.log(max(float(moved_by), 1e-9) / max(float(size), 1e-9)))
    return np.exp(np.interp(np.arange(len(calls)), at, found))


@contextmanager
def _replayed(
    pipe: DiffusionPipeline, trajectory: Trajectory, place: int, error: Tensor | None
) -> Iterator[None]:
    """Let the UNet return what it did before ``place``, there that with an error, then compute."""
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

    with mock.patch.object(unet, "forward", replay):
        yield
