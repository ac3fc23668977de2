"""Summarise the values of an experiment's images: means, differences, the Pareto front."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .intervals import Interval, bootstrap
from .protocol import UNPATCHED, Protocol

SIMILARITIES = ("psnr", "ssim", "cosine")
"""Metrics of each image and the unpatched one; higher is better for all of them."""

IMAGE_METRICS = (*SIMILARITIES, "clip_score")
"""Metrics of each image; higher is better for all of them."""

Values = dict[str, dict[str, list[float]]]
"""For each variant, for each metric, the value of each image."""

Table = dict[str, dict[str, Any]]
"""For each variant, for each metric, the mean with its interval."""


def add_means(table: Table, values: Values, prompts: list[str]) -> None:
    """Add the mean of each metric, with its interval over prompts."""
    for metric in (*IMAGE_METRICS, "time"):
        columns = np.stack([values[name][metric] for name in table], 1)
        for name, interval in zip(table, bootstrap(columns, prompts), strict=True):
            table[name][metric] = interval_to_json(interval)


def add_replicates(table: Table, values: Values, protocol: Protocol, numbers: list[int]) -> None:
    """Add the mean of each metric in each replicate, given the numbers of the images."""
    replicates = np.array([protocol.replicate(number) for number in numbers])
    for name, row in table.items():
        row["replicates"] = {
            metric: [
                float(np.mean(np.array(values[name][metric])[replicates == replicate]))
                for replicate in range(protocol.replicates)
            ]
            for metric in (*IMAGE_METRICS, "time")
        }


def paired_differences(
    values: Values, prompts: list[str]
) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """The mean difference of every two variants in each metric, paired by prompt and seed."""
    differences: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    for metric in IMAGE_METRICS:
        # Similarity to itself is not meaningful: unpatched only takes part in the CLIP score.
        names = [name for name in values if metric == "clip_score" or name != UNPATCHED]
        pairs = [(a, b) for a in names for b in names if a < b]
        if not pairs:
            continue
        of_images = {name: np.array(values[name][metric]) for name in names}
        columns = np.stack([of_images[a] - of_images[b] for a, b in pairs], 1)
        rows = differences.setdefault(metric, {})
        for (a, b), interval in zip(pairs, bootstrap(columns, prompts), strict=True):
            negated = Interval(-interval.mean, -interval.high, -interval.low)
            rows.setdefault(a, {})[b] = difference_to_json(interval)
            rows.setdefault(b, {})[a] = difference_to_json(negated)
    return differences


def difference_to_json(interval: Interval) -> dict[str, Any]:
    return {**interval_to_json(interval), "differs": interval.excludes_zero}


def interval_to_json(interval: Interval) -> dict[str, Any]:
    """An interval for JSON, which has no infinity: unknown ends become ``None``."""
    return {k: v if math.isfinite(v) else None for k, v in interval._asdict().items()}


def pareto_front(table: Table, metric: str = "psnr") -> list[str]:
    """The variants that no other variant beats in both time and quality, fastest first.

    Args:
        table: For each variant ``time`` and the metric, each with a ``mean``.
        metric: The quality; higher is better.

    Example:
        >>> row = lambda time, psnr: {"time": {"mean": time}, "psnr": {"mean": psnr}}
        >>> pareto_front({"a": row(0.5, 30), "b": row(0.6, 29), "c": row(0.7, 40)})
        ['a', 'c']
    """
    front: list[str] = []
    best = -np.inf
    names = [name for name in table if name != UNPATCHED]
    for name in sorted(names, key=lambda n: (table[n]["time"]["mean"], -table[n][metric]["mean"])):
        if table[name][metric]["mean"] > best:
            best = table[name][metric]["mean"]
            front.append(name)
    return front
