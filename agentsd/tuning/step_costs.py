"""Time whole and light steps on this device, and predict the time of a run from them."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from statistics import median
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline

from ..methods import Full, Phase
from ..methods.base import ENDS
from ..models.devices import wait_for
from ..patching.forecasts import whole_steps
from ..patching.light_steps import OUTPUT
from ..patching.patch import patched
from ..schedule import Schedule
from .trajectories import Trajectory, moved

ROUNDS = 3
CALLS = 7
"""UNet calls per round and kind of light step; only the light ones are timed."""


class Kind(NamedTuple):
    """What the time of a step depends on."""

    attention: str
    """The phase without its cache."""
    light: tuple[int, object] | None = None
    """Branch and order of the cache of a light step."""

    @classmethod
    def of(cls, phase: Phase, whole: bool) -> Kind:
        """The kind of a whole or light step of a phase."""
        attention = json.dumps(_attention_of(phase).to_dict())
        if whole or phase.cache is None:
            return cls(attention)
        light = phase.cache.branch, phase.cache.order
        return cls("" if phase.cache.branch == OUTPUT else attention, light)

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> Kind:
        """Read a kind from its JSON form."""
        return cls(line["attention"], line["light"] and tuple(line["light"]))


def _attention_of(phase: Phase) -> Phase:
    """A phase without its end and its cache."""
    return phase.without(*ENDS, "cache")


class StepCosts:
    """Median seconds of each kind of step.

    Args:
        seconds: Seconds of a step, by kind.
        rest: Seconds of a run outside its UNet: text encoder, scheduler and VAE.
    """

    def __init__(self, seconds: dict[Kind, float], rest: float) -> None:
        self.seconds, self.rest = seconds, rest

    def run(self, schedule: Schedule | None, trajectory: Trajectory) -> float:
        """Predicted seconds of a run with a schedule; ``None`` for unpatched.

        Raises:
            KeyError: If the schedule has a kind of step that was not measured.
        """
        positions = [call.position for call in trajectory.calls]
        if schedule is None:
            unpatched = self.seconds[Kind.of(Full(), True)]
            return self.rest + unpatched * len(positions)
        num_steps = positions[0].num_steps
        whole = whole_steps(schedule, num_steps)
        return self.rest + sum(
            self.seconds[Kind.of(schedule.phase_at(step, num_steps), whole[step])]
            for step, _, _ in positions
        )


def measure_steps(
    pipe: DiffusionPipeline,
    trajectory: Trajectory,
    schedules: Iterable[Schedule],
    check: Callable[[], None] = lambda: None,
) -> dict[Kind, float]:
    """Time each kind of step that occurs in schedules, interleaved.

    Args:
        pipe: An unpatched pipeline; unpatched again afterwards.
        trajectory: Provides the arguments of the UNet calls.
        schedules: The schedules.
        check: Called regularly; may raise to stop.

    Returns:
        Median seconds of each kind of step, including the unpatched step.
    """
    unpatched = Full()
    phases: dict[Kind, Phase] = {Kind.of(unpatched, True): unpatched}
    for schedule in schedules:
        for phase in schedule.phases:
            phases.setdefault(Kind.of(phase, True), _attention_of(phase))
            if phase.cache is not None:
                cached = phase.without(*ENDS).override(cache_interval=CALLS)
                phases.setdefault(Kind.of(phase, False), cached)
    measured: dict[Kind, list[float]] = defaultdict(list)
    for _ in range(ROUNDS):
        for kind, phase in phases.items():
            check()
            measured[kind] += _timed(pipe, trajectory, phase, light=kind.light is not None)
    return {kind: median(seconds) for kind, seconds in measured.items()}


def _timed(
    pipe: DiffusionPipeline, trajectory: Trajectory, phase: Phase, *, light: bool
) -> list[float]:
    """Seconds of a few light steps, or of one whole step after a warm-up step."""
    device = pipe._execution_device
    arguments = moved(trajectory.calls[0].arguments, device)
    steps = torch.arange(999, 0, -20, device=device)  # a call's step is derived from these
    schedule = Schedule(phases=(phase,))
    wanted = [False, True]
    if light:
        wanted = [not whole for whole in whole_steps(schedule, len(steps))[:CALLS]]
    seconds = []
    with patched(pipe, schedule), torch.inference_mode():
        for number, counts in enumerate(wanted):
            wait_for(device)
            begun = time.perf_counter()
            pipe.unet(**arguments | {"timestep": steps[number]})
            wait_for(device)
            if counts:
                seconds.append(time.perf_counter() - begun)
    return seconds
