"""Which candidates are worth real images: predictions from single steps on a few trajectories."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from diffusers import DiffusionPipeline
from numpy.typing import NDArray

from ..generation.images import make_batch
from ..generation.prompt_encoding import PromptEncoder
from ..schedule import Schedule
from .candidates import CACHES, Candidate, schedule_of, uniform_candidates
from .clock import Clock
from .probing import probing
from .search import search
from .step_costs import StepCosts
from .step_errors import StepErrors, weights_of_steps
from .trajectories import Trajectory
from .workspace import Workspace

LIST = "screened"
SHARE = 0.4
"""Of the time left, that the search may take."""

ROUNDS = 3000
"""Candidates to look at, at most."""


class Screened(NamedTuple):
    """A schedule that is worth real images."""

    schedule: Schedule
    time: float
    """As a share of an unpatched run."""
    psnr: float
    """What is predicted, in dB."""


def screen(
    pipe: DiffusionPipeline,
    trajectories: Sequence[Trajectory],
    costs: StepCosts,
    workspace: Workspace,
    clock: Clock,
    call_kwargs: Mapping[str, Any],
) -> list[Screened]:
    """The most promising candidates for each time, the fastest first; kept for later runs.

    Args:
        pipe: Unpatched, and again so afterwards.
        trajectories: One or more, of one number of steps.
        costs: For the candidates' times.
        workspace: Holds what an earlier run found.
        clock: Ends the search.
        call_kwargs: Further arguments of the pipeline's call.
    """
    num_steps = trajectories[0].calls[0].position.num_steps
    unpatched = costs.run(None, trajectories[0])

    def run_time(schedule: Schedule) -> float:
        return costs.run(schedule, trajectories[0]) / unpatched

    known = [
        Screened(schedule, run_time(schedule), line["psnr"])
        for line in workspace.lines(LIST)
        for schedule in [Schedule.from_dict(line["schedule"])]
    ]
    if known:
        return sorted(known, key=lambda each: each.time)
    if len(trajectories[0].calls) < 3:
        return []
    weights = [_weights(pipe, each, clock, call_kwargs) for each in trajectories]
    with probing(pipe, clock.check_stage) as probe:
        errors = [
            StepErrors(probe, each, found)
            for each, found in zip(trajectories, weights, strict=True)
        ]

        def error(candidate: Candidate) -> float:
            return math.sqrt(fmean(each.predict(candidate) ** 2 for each in errors))

        def time(candidate: Candidate) -> float:
            return run_time(schedule_of(candidate, num_steps))

        # However little time there is, the first attention is screened with each cache.
        for candidate in uniform_candidates(num_steps)[: len(CACHES)]:
            error(candidate)
        clock.begin("screening", SHARE)
        found = [
            Screened(schedule_of(each.candidate, num_steps), each.time, each.psnr)
            for each in search(num_steps, time, error, rounds=ROUNDS)
        ]
    for each in found:
        workspace.append(LIST, {"schedule": each.schedule.to_dict(), "psnr": each.psnr})
    return found


def _weights(
    pipe: DiffusionPipeline, trajectory: Trajectory, clock: Clock, call_kwargs: Mapping[str, Any]
) -> NDArray[np.float64]:
    encode = PromptEncoder(pipe)

    def draw() -> NDArray[np.float64]:
        clock.check()
        (raw,) = make_batch(pipe, [trajectory.settings], encode, call_kwargs)
        return np.asarray(raw.pixels, np.float64)

    return weights_of_steps(trajectory, pipe, draw)
