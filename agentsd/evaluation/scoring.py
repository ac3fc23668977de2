"""Measure the images of an experiment, and collect the figures of its report."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..errors import EvaluationError
from .features import Clip, Extractor, extract, load_clip, load_extractor
from .features.storage import Floats
from .image_sets import HIDDEN, MANIFEST, ImageEntry, read_image_set, read_manifest, visible
from .intervals import SMALL_SAMPLE, small_sample_warning
from .metrics import clip_score, fid, fid_bias_warning, kid, paired_difference
from .pairs import compare_pairs, pair_images
from .protocol import UNPATCHED, Protocol
from .summary import (
    SIMILARITIES,
    Table,
    Values,
    add_means,
    add_replicates,
    difference_to_json,
    interval_to_json,
    paired_differences,
    pareto_front,
)

ProgressReport = Callable[[str, int, int], object]
"""Called with the task, the amount done, and the total."""


class Metrics(NamedTuple):
    """What an experiment is measured with, loaded before any image is made."""

    clip: Clip
    extractor: Extractor
    reference: list[ImageEntry] | None  # None: the unpatched images

    @classmethod
    def load(cls, protocol: Protocol, device: Any = "cpu") -> Metrics:
        """Load the networks and list the reference that a protocol names.

        Raises:
            EvaluationError: If one of them is missing.
        """
        reference = None
        if protocol.reference != UNPATCHED:
            reference = visible(read_image_set(protocol.reference))
        clip = load_clip(protocol.clip, device)
        same = protocol.features == protocol.clip
        return cls(clip, clip if same else load_extractor(protocol.features, device), reference)


def measure(
    protocol: Protocol,
    out: Path,
    metrics: Metrics,
    *,
    cache: Path | None = None,
    progress: ProgressReport = lambda what, done, total: None,
) -> dict[str, Any]:
    """Measure all images of an experiment, with intervals over prompts.

    Args:
        protocol: The experiment.
        out: Its folder.
        metrics: What to measure with.
        cache: Folder of the feature cache.
        progress: Called as the work proceeds.

    Returns:
        The content of ``report.json``, except for the times that the experiment took.

    Raises:
        EvaluationError: If an image is missing or cannot be used.
    """
    variants, settings = protocol.all_variants(), protocol.images()
    made = {variant.name: _made_images(out, variant.name, len(settings)) for variant in variants}
    kept = _visible_in_all([[image for image, _ in pairs] for pairs in made.values()])
    images = {name: [pairs[number][0] for number in kept] for name, pairs in made.items()}
    records = {name: [pairs[number][1] for number in kept] for name, pairs in made.items()}
    prompts = [settings[number].prompt for number in kept]
    values, features, truncated = _measure_images(
        images, records, prompts, metrics, cache, progress
    )
    table: Table = {
        variant.name: {
            "spec": variant.spec,
            "seconds": float(np.median(values[variant.name]["seconds"])),
        }
        for variant in variants
    }
    add_means(table, values, prompts)
    if protocol.replicates > 1:
        add_replicates(table, values, protocol, kept)
    notes = _add_distances(protocol, table, features, prompts, metrics, cache, progress)
    if hidden := len(settings) - len(kept):
        notes.append(
            f"{hidden} of {len(settings)} images are left out: in at least one variant {HIDDEN}"
        )
    if truncated:
        notes.append(f"{truncated} of {len(prompts)} prompts are longer than CLIP reads")
    if warning := small_sample_warning(prompts):
        notes.append(warning)
    return {
        "protocol": protocol.model_dump(),
        "images_per_variant": len(kept),
        "variants": table,
        "differences": paired_differences(values, prompts),
        "front": pareto_front(table),
        "notes": notes,
        "values": values,
        "prompts": prompts,
        "made_with": _environment(records),
    }


def _made_images(out: Path, variant: str, count: int) -> list[tuple[ImageEntry, dict[str, Any]]]:
    """The images of a variant with their records, in order of their numbers."""
    folder = out / "images" / variant
    images, records = read_image_set(folder), read_manifest(folder / MANIFEST)
    made = {record["id"]: (image, record) for image, record in zip(images, records, strict=True)}
    missing = [number for number in range(count) if number not in made]
    if missing:
        raise EvaluationError(
            f"{folder} lacks {len(missing)} of {count} images; run the experiment again to make "
            "them"
        )
    return [made[number] for number in range(count)]


def _visible_in_all(variants: list[list[ImageEntry]]) -> list[int]:
    """The numbers of the images that are visible in every variant, since variants are paired."""
    numbers = range(len(variants[0]))
    kept = [i for i in numbers if not any(images[i].hidden for images in variants)]
    if not kept:
        raise EvaluationError(f"{HIDDEN}: each of {len(numbers)} images in at least one variant")
    return kept


def _measure_images(
    images: dict[str, list[ImageEntry]],
    records: dict[str, list[dict[str, Any]]],
    prompts: list[str],
    metrics: Metrics,
    cache: Path | None,
    progress: ProgressReport,
) -> tuple[Values, dict[str, Floats], int]:
    """Measure each image of each variant.

    Returns:
        The values; the features of each variant for FID and KID; and the number of prompts that
        CLIP truncated.
    """
    texts, truncated = metrics.clip.embed_texts(prompts)
    total = len(images) * len(prompts)
    values: Values = {}
    features: dict[str, Floats] = {}

    def report_pairs(before: int, done: int) -> None:
        progress("images measured", before + done, total)

    for before, name in zip(range(0, total, len(prompts)), images, strict=True):
        embeddings = extract(images[name], metrics.clip, folder=cache).values
        features[name] = extract(images[name], metrics.extractor, folder=cache).values
        pairs = pair_images(images[name], images[UNPATCHED])
        rows = compare_pairs(
            pairs, metrics.clip, folder=cache, progress=partial(report_pairs, before)
        ).rows
        seconds = [record["seconds"] for record in records[name]]
        baseline = [record["seconds"] for record in records[UNPATCHED]]
        values[name] = {metric: [row[metric] for row in rows] for metric in SIMILARITIES}
        values[name]["clip_score"] = clip_score(embeddings, texts).tolist()
        values[name]["seconds"] = seconds
        values[name]["time"] = [a / b for a, b in zip(seconds, baseline, strict=True)]
    return values, features, len(truncated)


def _add_distances(
    protocol: Protocol,
    table: Table,
    features: dict[str, Floats],
    prompts: list[str],
    metrics: Metrics,
    cache: Path | None,
    progress: ProgressReport,
) -> list[str]:
    """Add FID and KID of each variant; returns notes on them."""
    count, dimensions = features[UNPATCHED].shape
    if count < SMALL_SAMPLE:
        return [
            f"{count} images per variant are too few for FID and KID; at least {SMALL_SAMPLE} are "
            "needed"
        ]
    reference = features[UNPATCHED]
    if (real := metrics.reference) is not None:
        reference = extract(
            real,
            metrics.extractor,
            protocol.read_options,
            folder=cache,
            progress=lambda done: progress("reference images", done, len(real)),
        ).values
    for key, distance in (("fid", fid), ("kid", kid)):
        estimates = {name: distance(values, reference) for name, values in features.items()}
        for name, estimate in estimates.items():
            table[name][key] = interval_to_json(estimate.interval)
            if real is not None and name != UNPATCHED:
                difference = paired_difference(estimate, estimates[UNPATCHED], prompts)
                table[name][f"{key}_difference"] = difference_to_json(difference)
    warning = fid_bias_warning(count, dimensions)
    return [warning] if warning else []


def _environment(records: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The hardware and the versions with which the images were made and measured."""
    everything = [record for of_variant in records.values() for record in of_variant]
    made_with = {
        key: ", ".join(sorted({str(record[key]) for record in everything}))
        for key in ("device", "dtype", "torch")
    }
    versions = {}
    for package in ("agentsd", "diffusers", "transformers", "torchmetrics", "tomesd", "DeepCache"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        **made_with,
        **versions,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
