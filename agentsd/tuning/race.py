"""Find the candidate that serves a budget best, with as few real images as it takes.

Each image is compared with the unpatched one of its prompt and seed. The hardest images come first:
a candidate that fails there needs no others. At each turn, the most promising candidate gets its
next image; what is promising is told by a model of two effects, one of the candidate and one of the
image, fitted to all that was measured and leaning on the predicted errors where little was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import NamedTuple

import numpy as np

from ..evaluation.intervals import student_quantile
from ..schedule import Schedule
from .budget import SHARE, SPEED, Budget, decibels

ROUNDS = 20
"""Of fitting one effect after the other."""

PRIOR = 0.5
"""How many images the prediction of a candidate counts for."""

AMPLE = 10.0
"""Likenesses that surpass the bound by more dB than this count as if by this much."""

SPREAD = 3.0
"""Standard deviation, in dB, of candidates from what is predicted, before any is known."""

FEW, SLOPES = 4, (0.3, 1.2)
"""Candidates from which on the slope of their predictions is fitted, and its limits."""


@dataclass
class Entry:
    """A schedule in the race.

    Args:
        name: Unique.
        schedule: The schedule.
        time: Of a run as a share of an unpatched one, from the measured times of its steps.
        predicted: Likeness in dB, for candidates; ``None`` for presets.
        values: The budget's likeness of each image that was made, by number.
    """

    name: str
    schedule: Schedule
    time: float
    predicted: float | None = None
    values: dict[int, float] = field(default_factory=dict)


class Race:
    """Entries, and what is known and expected of each.

    Args:
        entries: The entries, with what was measured before.
        budget: What they must keep to.
        images: How many images there are, until there is time for more.
        measure: Makes an image with an entry's schedule; returns its likeness.
    """

    def __init__(
        self,
        entries: Iterable[Entry],
        budget: Budget,
        images: int,
        measure: Callable[[Entry, int], float],
    ) -> None:
        self.entries = {entry.name: entry for entry in entries}
        self.budget, self._measure = budget, measure
        self.images = self.first = images

    def run_whole(self, entry: Entry) -> None:
        """Make all of an entry's images that are missing."""
        for image in range(self.images):
            self.make(entry, image)

    def explore(self, entries: Iterable[Entry], count: int) -> None:
        """Make the hardest image of a few entries, from the least to the best predicted."""
        among = [entry for entry in entries if entry.predicted is not None]
        among.sort(key=lambda entry: entry.predicted or 0.0)
        image = self.hardest_first(self.expectations())[0]
        for place in np.linspace(0, len(among) - 1, min(count, len(among))):
            self.make(among[round(place)], image)

    def make(self, entry: Entry, image: int) -> None:
        """Make one image, if it is missing."""
        if image not in entry.values:
            entry.values[image] = self._measure(entry, image)

    def winner(self, entries: Iterable[Entry], *, hope: float = 0.0) -> Entry | None:
        """Make images until no other entry is expected to be better than the best that has all.

        Args:
            entries: Those to choose from.
            hope: By how many of its standard deviations an entry may surpass what is expected of
                it. With more, more images are made of entries that may turn out better.

        Returns:
            The best; where none meets the budget the one that comes closest. ``None`` if there
            are no entries to choose from.
        """
        among = list(entries)
        while True:
            expected = self.expectations()
            best = min(among, key=lambda e: self._rank(e, expected, hope), default=None)
            if best is None or len(best.values) == self.images:
                return best
            missing = [i for i in self.hardest_first(expected) if i not in best.values]
            self.make(best, missing[0])

    def best(self, entries: Iterable[Entry]) -> Entry | None:
        """The best of the entries that have the first images; ``None`` if there are none.

        What it is worth on further ones is measured, or else expected.
        """
        expected = self.expectations()
        whole = [each for each in entries if self.is_known(each)]
        return min(whole, key=lambda e: self._rank(e, expected, 0.0), default=None)

    def is_known(self, entry: Entry) -> bool:
        """Whether an entry has the first images."""
        return all(image in entry.values for image in range(self.first))

    def may_meet(self, entry: Entry, images: int) -> bool:
        """Whether an entry can still keep to a likeness, once it has so many images."""
        values = [decibels(self.budget.metric, value) for value in entry.values.values()]
        unseen = [math.inf] * (images - len(values))
        return seen_floor(values + unseen) >= decibels(self.budget.metric, self.budget.bound)

    def meets(self, entry: Entry) -> bool:
        """Whether an entry keeps to the budget (by its time, if that is of speed)."""
        return self._rank(entry, self.expectations(), 0.0)[0] == 0

    def _rank(self, entry: Entry, expected: Expectations, hope: float) -> tuple[int, float]:
        """Less is better."""
        likeness = expected.candidates[entry.name]
        if len(entry.values) < self.images:
            likeness += hope * expected.spread * PRIOR / (PRIOR + len(entry.values))
        if self.budget.metric == SPEED:
            meets = self.budget.is_met(1 / entry.time)
            return (0, -likeness) if meets else (1, entry.time)
        values = [decibels(self.budget.metric, v) for v in entry.values.values()]
        others = [i for i in range(self.images) if i not in entry.values]
        values += [likeness + expected.images[i] for i in others]
        bound = decibels(self.budget.metric, self.budget.bound)
        normal = likely_floor([min(value, bound + AMPLE) for value in values])
        floor = min(seen_floor(values), normal)
        return (0, entry.time) if floor >= bound else (1, -floor)

    def hardest_first(self, expected: Expectations) -> list[int]:
        """The images, those first on which entries do worst."""
        return sorted(range(self.images), key=lambda image: expected.images[image])

    def expectations(self) -> Expectations:
        """Fit the effects of candidates and images to all that was measured."""
        seen = [
            (entry.name, image, decibels(self.budget.likeness, value))
            for entry in self.entries.values()
            for image, value in entry.values.items()
        ]
        predicted = {e.name: e.predicted for e in self.entries.values() if e.predicted is not None}
        images, line = np.zeros(self.images), Line(1.0, 0.0, SPREAD)
        effects: dict[str, float] = {}
        for _ in range(ROUNDS):
            found: dict[str, list[float]] = {}
            for name, image, value in seen:
                found.setdefault(name, []).append(value - images[image])
            line = Line.through(
                [(predicted[n], fmean(v)) for n, v in found.items() if n in predicted]
            )
            effects = {name: line.blended(predicted.get(name), v) for name, v in found.items()}
            sums, counts = np.zeros(self.images), np.zeros(self.images)
            for name, image, value in seen:
                sums[image] += value - effects[name]
                counts[image] += 1
            images = sums / np.maximum(counts, 1)
            images -= images[counts > 0].mean() if seen else 0.0
        known = {name: line.at(value) for name, value in predicted.items()} | effects
        lowest = min(known.values(), default=0.0)
        candidates = {name: known.get(name, lowest) for name in self.entries}
        return Expectations(candidates, [float(image) for image in images], line.spread)


def seen_floor(values: list[float], share: float = SHARE) -> float:
    """What a new value surpasses with this probability, whatever their distribution: of 9 values
    the least, of 19 the second (with fewer than 9 the least, and less surely).

    Example:
        >>> seen_floor([5.0, 1.0, 3.0]), seen_floor([float(n) for n in range(19)])
        (1.0, 1.0)
    """
    place = math.floor((1 - share) * (len(values) + 1) + 1e-9)
    return sorted(values)[max(0, place - 1)]


def likely_floor(values: list[float], share: float = SHARE) -> float:
    """What a new value surpasses with this probability, were they normal (a prediction interval).

    Example:
        >>> round(likely_floor([46.0, 48.0, 50.0, 52.0, 54.0]), 1)
        44.7
    """
    count = len(values)
    far = student_quantile(share, count - 1) * math.sqrt(1 + 1 / count)
    return fmean(values) - far * stdev(values)


@dataclass(frozen=True)
class Expectations:
    """What is expected, in dB: the sum of a candidate's and an image's effect."""

    candidates: dict[str, float]
    images: list[float]
    spread: float
    """Standard deviation of candidates of which no image was made."""


class Line(NamedTuple):
    """What predictions were found to mean, in dB."""

    slope: float
    offset: float
    spread: float

    @classmethod
    def through(cls, points: list[tuple[float, float]]) -> Line:
        """Fitted to predictions and what was found instead; few of them only tell the offset."""
        if not points:
            return cls(1.0, 0.0, SPREAD)
        x, y = np.array(points).T
        slope = 1.0
        if len(points) >= FEW and np.ptp(x) > SPREAD:
            slope = float(np.clip(np.polyfit(x, y, 1)[0], *SLOPES))
        offset = float(np.mean(y - slope * x))
        # As if one more had been found, as far off as candidates are at first.
        squares = float(np.sum((y - offset - slope * x) ** 2)) + SPREAD**2
        return cls(slope, offset, math.sqrt(squares / len(points)))

    def at(self, predicted: float) -> float:
        """What is expected of a candidate."""
        return self.slope * predicted + self.offset

    def blended(self, predicted: float | None, found: list[float]) -> float:
        """The mean of what was found, drawn to what was expected."""
        if predicted is None:
            return fmean(found)
        return (math.fsum(found) + PRIOR * self.at(predicted)) / (len(found) + PRIOR)
