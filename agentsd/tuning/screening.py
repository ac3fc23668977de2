"""Select the candidates that are worth real images, by errors predicted from single steps.

One search finds the whole front, for any budget: it keeps the few candidates with the least
predicted error in each class of time, and makes new ones by changing one of them: another attention
or cache in a segment, a border moved, a segment split or dropped. The idea comes from MAP-Elites
(Mouret and Clune, 2015, arXiv 1504.04909).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from diffusers import DiffusionPipeline
from numpy.typing import NDArray

from ..generation.images import make_batch
from ..generation.prompt_encoding import PromptEncoder
from ..schedule import Schedule
from .candidates import (
    ATTENTION,
    CACHES,
    MAX_SEGMENTS,
    Candidate,
    Segment,
    schedule_of,
    uniform_candidates,
)
from .clock import Clock, OutOfTime
from .probing import probing
from .step_costs import StepCosts
from .step_errors import StepErrors, weights_of_steps
from .trajectories import Trajectory
from .workspace import Workspace

LIST = "screened"
SHARE = 0.4
"""Share of the time left that the search may take."""

ROUNDS = 3000
"""Maximum number of candidates to look at."""


CLASS = 0.01
"""Width of a class of time, as a share of an unpatched run."""

KEPT = 3
"""Candidates kept per class."""


class Screened(NamedTuple):
    """A schedule that is worth real images."""

    schedule: Schedule
    time: float
    """As a share of an unpatched run."""
    psnr: float
    """Predicted, in dB."""


def screen(
    pipe: DiffusionPipeline,
    trajectories: Sequence[Trajectory],
    costs: StepCosts,
    workspace: Workspace,
    clock: Clock,
    call_kwargs: Mapping[str, Any],
) -> list[Screened]:
    """The most promising candidates for each time, fastest first; saved for later runs.

    Args:
        pipe: An unpatched pipeline; unpatched again afterwards.
        trajectories: One or more, all with the same number of steps.
        costs: Times of single steps.
        workspace: Holds the result of an earlier run.
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
        return sorted(known, key=lambda screened: screened.time)
    if len(trajectories[0].calls) < 3:
        return []
    weights = [_weights(pipe, trajectory, clock, call_kwargs) for trajectory in trajectories]
    with probing(pipe, clock.check_stage) as probe:
        step_errors = [StepErrors(probe, *pair) for pair in zip(trajectories, weights, strict=True)]

        def error(candidate: Candidate) -> float:
            return math.sqrt(fmean(errors.predict(candidate) ** 2 for errors in step_errors))

        def time(candidate: Candidate) -> float:
            return run_time(schedule_of(candidate, num_steps))

        # However little time there is, the first attention is screened with each cache.
        for candidate in uniform_candidates(num_steps)[: len(CACHES)]:
            error(candidate)
        clock.begin("screening", SHARE)
        selected = [
            Screened(schedule_of(prediction.candidate, num_steps), prediction.time, prediction.psnr)
            for prediction in search(num_steps, time, error, rounds=ROUNDS)
        ]
    for schedule, _, psnr in selected:
        workspace.append(LIST, {"schedule": schedule.to_dict(), "psnr": psnr})
    return selected


def _weights(
    pipe: DiffusionPipeline, trajectory: Trajectory, clock: Clock, call_kwargs: Mapping[str, Any]
) -> NDArray[np.float64]:
    encode = PromptEncoder(pipe)

    def draw() -> NDArray[np.float64]:
        clock.check()
        (raw,) = make_batch(pipe, [trajectory.settings], encode, call_kwargs)
        return np.asarray(raw.pixels, np.float64)

    return weights_of_steps(trajectory, pipe, draw)


class Prediction(NamedTuple):
    """A candidate with its predicted error and time."""

    error: float
    """Root mean square over pixels in [0, 1] and over trajectories."""
    time: float
    """As a share of an unpatched run."""
    candidate: Candidate

    @property
    def psnr(self) -> float:
        """The error in dB."""
        return -20 * math.log10(max(self.error, 1e-9))


def search(
    num_steps: int,
    time: Callable[[Candidate], float],
    error: Callable[[Candidate], float],
    *,
    rounds: int,
    seed: int = 0,
) -> list[Prediction]:
    """The candidates with the least predicted error in each class of time, fastest first.

    Args:
        num_steps: Denoising steps of a run.
        time: Predicts a candidate's time, as a share of an unpatched run.
        error: Predicts its error; :class:`OutOfTime` ends the search.
        rounds: Candidates to look at besides the uniform ones.
        seed: Seed of the random changes.
    """
    draw = random.Random(seed)
    classes: dict[int, list[Prediction]] = {}
    seen: set[Candidate] = set()

    def look_at(candidate: Candidate) -> None:
        if candidate in seen:
            return
        seen.add(candidate)
        predicted = Prediction(error(candidate), time(candidate), candidate)
        best = classes.setdefault(int(predicted.time / CLASS), [])
        best.append(predicted)
        best.sort()
        del best[KEPT:]

    with suppress(OutOfTime):
        for candidate in uniform_candidates(num_steps):
            look_at(candidate)
        for _ in range(rounds):
            parent = draw.choice(classes[draw.choice(list(classes))]).candidate
            for _ in range(draw.choice((1, 1, 2))):
                parent = _changed(parent, num_steps, draw)
            look_at(parent)
    fastest_first = sorted((p for best in classes.values() for p in best), key=lambda p: p.time)
    return list(_useful(fastest_first))


def _useful(fastest_first: list[Prediction]) -> Iterator[Prediction]:
    """The candidates that fewer than KEPT others beat in both predicted time and error."""
    errors: list[float] = []
    for prediction in fastest_first:
        if sum(error <= prediction.error for error in errors) < KEPT:
            yield prediction
        errors.append(prediction.error)


def _changed(candidate: Candidate, num_steps: int, draw: random.Random) -> Candidate:
    """A candidate with one random change."""
    segments = list(candidate)
    place = draw.randrange(len(segments))
    attention, cache, end = segments[place]
    start = segments[place - 1].end if place else 0
    change = draw.choice(("attention", "cache", "cache", "border", "border", "split", "drop"))
    if change == "attention":
        segments[place] = Segment(draw.randrange(len(ATTENTION)), cache, end)
    elif change == "cache":
        segments[place] = Segment(attention, draw.randrange(len(CACHES)), end)
    elif change == "border" and place < len(segments) - 1:
        end = min(max(end + draw.choice((-2, -1, 1, 2)), start + 1), segments[place + 1].end - 1)
        segments[place] = Segment(attention, cache, end)
    elif change == "split" and len(segments) < MAX_SEGMENTS and end - start > 1:
        middle = draw.randrange(start + 1, end)
        other = Segment(draw.randrange(len(ATTENTION)), draw.randrange(len(CACHES)), middle)
        segments.insert(place, other)
    elif change == "drop" and len(segments) > 1:
        del segments[place]
    segments[-1] = segments[-1]._replace(end=num_steps)
    return tuple(_merged(segments))


def _merged(segments: list[Segment]) -> Iterator[Segment]:
    """Merge neighbouring segments with equal settings."""
    for segment, following in pairwise(segments):
        if segment[:2] != following[:2] and segment.end < following.end:
            yield segment
    yield segments[-1]
