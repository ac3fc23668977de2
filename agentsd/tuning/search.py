"""Search for the candidates of least predicted error, for every time at once.

The candidates found are kept in classes of time, a few in each, and new ones are made by changing
those: another attention or cache in a segment, a border moved, a segment split or dropped. So the
whole front is found in one search, whatever the budget (the idea is MAP-Elites': Mouret and Clune,
2015, arXiv 1504.04909).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from typing import NamedTuple

from .candidates import ATTENTION, CACHES, MOST_SEGMENTS, Candidate, Segment, uniform_candidates
from .clock import OutOfTime

CLASS = 0.01
"""Width of a class of time, as a share of an unpatched run."""

KEPT = 3
"""Candidates that are kept in a class."""


class Prediction(NamedTuple):
    """A candidate with what is predicted of it."""

    error: float
    """Root mean square over pixels in [0, 1], and over trajectories."""
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
    """The candidates of least predicted error in each class of time, the fastest first.

    Args:
        num_steps: Denoising steps of a run.
        time: Predicts a candidate's time, as a share of an unpatched run.
        error: Predicts its error; OutOfTime ends the search.
        rounds: Candidates to look at, besides the uniform ones.
        seed: Of the changes.
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
    found = sorted((p for best in classes.values() for p in best), key=lambda p: p.time)
    return list(_useful(found))


def _useful(found: list[Prediction]) -> Iterator[Prediction]:
    """Those to which no KEPT others are predicted to be both faster and closer."""
    errors: list[float] = []
    for each in found:
        if sum(error <= each.error for error in errors) < KEPT:
            yield each
        errors.append(each.error)


def _changed(candidate: Candidate, num_steps: int, draw: random.Random) -> Candidate:
    """A candidate that differs in one thing."""
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
    elif change == "split" and len(segments) < MOST_SEGMENTS and end - start > 1:
        middle = draw.randrange(start + 1, end)
        other = Segment(draw.randrange(len(ATTENTION)), draw.randrange(len(CACHES)), middle)
        segments.insert(place, other)
    elif change == "drop" and len(segments) > 1:
        del segments[place]
    segments[-1] = segments[-1]._replace(end=num_steps)
    return tuple(_merged(segments))


def _merged(segments: list[Segment]) -> Iterator[Segment]:
    """The segments, of equal neighbours the last alone."""
    for one, after in pairwise(segments):
        if one[:2] != after[:2] and one.end < after.end:
            yield one
    yield segments[-1]
