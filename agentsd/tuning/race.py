"""Find the best candidate for a budget with as few real images as possible.

Each image is compared with the unpatched one of its prompt and seed. The hardest images come first:
a candidate that fails on those needs no others. At each turn, the most promising candidate gets its
next image. Its promise is estimated by a model with two effects, one of the candidate and one of
the image, fitted to all measurements; where these are few, it relies on predicted errors.
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
"""Iterations of the fit, which alternates between the two effects."""

PRIOR = 0.5
"""Weight of a candidate's prediction, in images."""

AMPLE = 10.0
"""Similarity above the bound is capped at this margin, in dB."""

SPREAD = 3.0
"""Prior standard deviation of candidates from their predictions, in dB."""

FEW, SLOPES = 4, (0.3, 1.2)
"""Number of candidates from which the slope of predictions is fitted, and its limits."""


@dataclass
class RaceEntry:
    """A schedule in the race.

    Args:
        name: Unique.
        schedule: The schedule.
        time: Predicted from measured step times, as a share of an unpatched run.
        predicted: Similarity in dB, for candidates; ``None`` for presets.
        values: Similarity of each image made so far, by number.
    """

    name: str
    schedule: Schedule
    time: float
    predicted: float | None = None
    values: dict[int, float] = field(default_factory=dict)


class Race:
    """The entries, with their measurements and expected similarities.

    Args:
        entries: The entries, with earlier measurements.
        budget: The budget that they must meet.
        images: Number of images at first; more follow if there is time.
        measure: Makes an image with an entry's schedule and returns its similarity.
    """

    def __init__(
        self,
        entries: Iterable[RaceEntry],
        budget: Budget,
        images: int,
        measure: Callable[[RaceEntry, int], float],
    ) -> None:
        self.entries = {entry.name: entry for entry in entries}
        self.budget, self._measure = budget, measure
        self.images = self.first = images

    def run_whole(self, entry: RaceEntry) -> None:
        """Make all missing images of an entry."""
        for image in range(self.images):
            self.make(entry, image)

    def explore(self, entries: Iterable[RaceEntry], count: int) -> None:
        """Make the hardest image for a few entries, spread over the range of predictions."""
        candidates = [entry for entry in entries if entry.predicted is not None]
        candidates.sort(key=lambda entry: entry.predicted or 0.0)
        image = self.hardest_first(self.expectations())[0]
        for place in np.linspace(0, len(candidates) - 1, min(count, len(candidates))):
            self.make(candidates[round(place)], image)

    def make(self, entry: RaceEntry, image: int) -> None:
        """Make one image if it is missing."""
        if image not in entry.values:
            entry.values[image] = self._measure(entry, image)

    def winner(self, entries: Iterable[RaceEntry], *, optimism: float = 0.0) -> RaceEntry | None:
        """Make images until no entry is expected to beat the best one with all of its images.

        Args:
            entries: The entries to choose from.
            optimism: Bonus to an entry's expected similarity, in standard deviations. A larger one
                makes more images of entries that may turn out better.

        Returns:
            The best entry, or the closest one if none meets the budget; ``None`` without entries.
        """
        among = list(entries)
        while True:
            expected = self.expectations()
            best = min(among, key=lambda e: self._rank(e, expected, optimism), default=None)
            if best is None or len(best.values) == self.images:
                return best
            missing = [i for i in self.hardest_first(expected) if i not in best.values]
            self.make(best, missing[0])

    def best(self, entries: Iterable[RaceEntry]) -> RaceEntry | None:
        """The best of the entries that have all of the first images; ``None`` if there are none.

        Further images count with their measured or else their expected similarity.
        """
        expected = self.expectations()
        known = [entry for entry in entries if self.is_known(entry)]
        return min(known, key=lambda e: self._rank(e, expected, 0.0), default=None)

    def is_known(self, entry: RaceEntry) -> bool:
        """Whether an entry has all of the first images."""
        return all(image in entry.values for image in range(self.first))

    def may_meet(self, entry: RaceEntry, images: int) -> bool:
        """Whether an entry can still meet a similarity budget once it has ``images`` images."""
        values = [decibels(self.budget.metric, value) for value in entry.values.values()]
        unseen = [math.inf] * (images - len(values))
        return seen_floor(values + unseen) >= decibels(self.budget.metric, self.budget.bound)

    def meets(self, entry: RaceEntry) -> bool:
        """Whether an entry meets the budget (by its predicted time, for a speed budget)."""
        return self._rank(entry, self.expectations(), 0.0)[0] == 0

    def _rank(self, entry: RaceEntry, expected: Expectations, optimism: float) -> tuple[int, float]:
        """Sort key; lower is better."""
        similarity = expected.candidates[entry.name]
        if len(entry.values) < self.images:
            similarity += optimism * expected.spread * PRIOR / (PRIOR + len(entry.values))
        if self.budget.metric == SPEED:
            meets = self.budget.is_met(1 / entry.time)
            return (0, -similarity) if meets else (1, entry.time)
        values = [decibels(self.budget.metric, v) for v in entry.values.values()]
        others = [i for i in range(self.images) if i not in entry.values]
        values += [similarity + expected.images[i] for i in others]
        bound = decibels(self.budget.metric, self.budget.bound)
        normal = likely_floor([min(value, bound + AMPLE) for value in values])
        floor = min(seen_floor(values), normal)
        return (0, entry.time) if floor >= bound else (1, -floor)

    def hardest_first(self, expected: Expectations) -> list[int]:
        """The numbers of the images, hardest first."""
        return sorted(range(self.images), key=lambda image: expected.images[image])

    def expectations(self) -> Expectations:
        """Fit the effects of candidates and images to all measurements."""
        seen = [
            (entry.name, image, decibels(self.budget.similarity, value))
            for entry in self.entries.values()
            for image, value in entry.values.items()
        ]
        predicted = {e.name: e.predicted for e in self.entries.values() if e.predicted is not None}
        images, line = np.zeros(self.images), Calibration(1.0, 0.0, SPREAD)
        effects: dict[str, float] = {}
        for _ in range(ROUNDS):
            values: dict[str, list[float]] = {}
            for name, image, value in seen:
                values.setdefault(name, []).append(value - images[image])
            line = Calibration.fit(
                [(predicted[n], fmean(v)) for n, v in values.items() if n in predicted]
            )
            effects = {name: line.blended(predicted.get(name), v) for name, v in values.items()}
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
    """The bound that a new value exceeds with this probability, whatever the distribution.

    It is the lowest of 9 values and the second lowest of 19. With fewer than 9 values it is the
    lowest, which a new value exceeds with a lower probability.

    Example:
        >>> seen_floor([5.0, 1.0, 3.0]), seen_floor([float(n) for n in range(19)])
        (1.0, 1.0)
    """
    place = math.floor((1 - share) * (len(values) + 1) + 1e-9)
    return sorted(values)[max(0, place - 1)]


def likely_floor(values: list[float], share: float = SHARE) -> float:
    """The bound that a new normal value exceeds with this probability (a prediction interval).

    Example:
        >>> round(likely_floor([46.0, 48.0, 50.0, 52.0, 54.0]), 1)
        44.7
    """
    count = len(values)
    far = student_quantile(share, count - 1) * math.sqrt(1 + 1 / count)
    return fmean(values) - far * stdev(values)


@dataclass(frozen=True)
class Expectations:
    """Expected similarity in dB: the sum of a candidate's and an image's effect."""

    candidates: dict[str, float]
    images: list[float]
    spread: float
    """Standard deviation of candidates without images."""


class Calibration(NamedTuple):
    """How predictions relate to measurements, in dB."""

    slope: float
    offset: float
    spread: float

    @classmethod
    def fit(cls, points: list[tuple[float, float]]) -> Calibration:
        """Fit pairs of prediction and measurement; if there are few, only the offset."""
        if not points:
            return cls(1.0, 0.0, SPREAD)
        x, y = np.array(points).T
        slope = 1.0
        if len(points) >= FEW and np.ptp(x) > SPREAD:
            slope = float(np.clip(np.polyfit(x, y, 1)[0], *SLOPES))
        offset = float(np.mean(y - slope * x))
        # A pseudo-observation at the prior spread.
        squares = float(np.sum((y - offset - slope * x) ** 2)) + SPREAD**2
        return cls(slope, offset, math.sqrt(squares / len(points)))

    def at(self, predicted: float) -> float:
        """The expected value of a candidate."""
        return self.slope * predicted + self.offset

    def blended(self, predicted: float | None, measured: list[float]) -> float:
        """The mean of the measurements, shrunk towards the prediction."""
        if predicted is None:
            return fmean(measured)
        return (math.fsum(measured) + PRIOR * self.at(predicted)) / (len(measured) + PRIOR)
