"""Which candidates are worth real images: predictions from single steps on a few trajectories."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
from diffusers import DiffusionPipeline
from numpy.typing import NDArray

from ..generation.images import make_batch
from ..generation.prompt_encoding import PromptEncoder
from .candidates import Candidate, Segment, schedule_of
from .clock import Clock
from .probing import probing
from .search import Prediction, search
from .step_costs import StepCosts
from .step_errors import StepErrors, weights_of_steps
from .trajectories import Trajectory
from .workspace import Workspace

LIST = "screened"
ROUNDS = 3000
"""Candidates to look at, at most."""


def screen(
    pipe: DiffusionPipeline,
    trajectories: Sequence[Trajectory],
    costs: StepCosts,
    workspace: Workspace,
    clock: Clock,
    inputs: Mapping[str, Any],
) -> list[Prediction]:
    """The most promising candidates for each time, the fastest first; kept for later runs.

    Args:
        pipe: Unpatched, and again so afterwards.
        trajectories: One or more, of one number of steps.
        costs: For the candidates' times.
        workspace: Holds what an earlier run found.
        clock: Its stage ends the search.
        inputs: Further arguments of the pipeline's call.
    """
    num_steps = trajectories[0].calls[0].position.num_steps
    unpatched = costs.run(None, trajectories[0])

    def time(candidate: Candidate) -> float:
        return costs.run(schedule_of(candidate, num_steps), trajectories[0]) / unpatched

    known = [
        Prediction(line["error"], time(candidate), candidate)
        for line in workspace.lines(LIST)
        if (candidate := tuple(Segment(*segment) for segment in line["candidate"]))
    ]
    if known:
        return sorted(known, key=lambda each: each.time)
    if len(trajectories[0].calls) < 3:
        return []
    weights = [_weights(pipe, each, clock, inputs) for each in trajectories]
    with probing(pipe, clock.check_stage) as probe:
        errors = [
            StepErrors(probe, each, found)
            for each, found in zip(trajectories, weights, strict=True)
        ]

        def error(candidate: Candidate) -> float:
            return math.sqrt(fmean(each.predict(candidate) ** 2 for each in errors))

        found = search(num_steps, time, error, rounds=ROUNDS)
    for each in found:
        workspace.append(LIST, {"error": each.error, "candidate": each.candidate})
    return found


def _weights(
    pipe: DiffusionPipeline, trajectory: Trajectory, clock: Clock, inputs: Mapping[str, Any]
) -> NDArray[np.float64]:
    encode = PromptEncoder(pipe)

    def draw() -> NDArray[np.float64]:
        clock.check()
        (raw,) = make_batch(pipe, [trajectory.settings], encode, inputs)
        return np.asarray(raw.pixels, np.float64)

    return weights_of_steps(trajectory, pipe, draw)
