"""Measure the images of an experiment: figures with intervals, differences, the front."""

from __future__ import annotations

import math
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
from .features import Clip, Extractor, clip, extract, extractor
from .intervals import ENOUGH, Interval, bootstrap, small_sample_warning
from .likeness import likeness, pairs
from .metrics import clip_score, difference, fid, fid_bias_warning, kid
from .pictures import HIDDEN, MANIFEST, Picture, pictures, read_manifest, visible
from .protocol import UNPATCHED, Protocol, Variant

FIGURES = ("psnr", "ssim", "cosine", "clip_score")
"""Measured of each image; higher is better in all of them."""

Progress = Callable[[str, int, int], object]
"""Called with what is being done, how much of it is done, and of how much."""


class Judges(NamedTuple):
    """What an experiment is measured by, loaded before its images are made."""

    clip: Clip
    features: Extractor
    reference: list[Picture] | None  # None: the unpatched images

    @classmethod
    def of(cls, protocol: Protocol, device: Any = "cpu") -> Judges:
        """Load those that a protocol names.

        Raises:
            EvaluationError: If one is not there.
        """
        named = protocol.reference != UNPATCHED
        reference = visible(pictures(protocol.reference)) if named else None
        judge = clip(protocol.clip, device)
        same = protocol.features == protocol.clip
        return cls(judge, judge if same else extractor(protocol.features, device), reference)


def measure(
    protocol: Protocol,
    out: Path,
    judges: Judges,
    *,
    cache: Path | None = None,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """All figures of the images that are there, with intervals over prompts.

    Raises:
        EvaluationError: If an image is missing or cannot be used.
    """
    judge = judges.clip
    ways, every = protocol.ways(), protocol.images()
    sets = {way.name: _made(out, way, len(every)) for way in ways}
    kept = _visible([[picture for picture, _ in found] for found in sets.values()])
    wanted = [every[number] for number in kept]
    prompts = [settings.prompt for settings in wanted]
    texts, cut = judge.texts(prompts)
    entries = {name: [found[number][1] for number in kept] for name, found in sets.items()}
    images = {name: [found[number][0] for number in kept] for name, found in sets.items()}
    values: dict[str, dict[str, list[float]]] = {}
    features: dict[str, Any] = {}
    total = len(ways) * len(wanted)

    def measured(before: int, done: int) -> None:
        progress("images measured", before + done, total)

    for before, way in zip(range(0, total, len(wanted)), ways, strict=True):
        name = way.name
        seen = extract(images[name], judge, folder=cache).values
        features[name] = extract(images[name], judges.features, folder=cache).values
        both = pairs(images[name], images[UNPATCHED])
        rows = likeness(both, judge, folder=cache, progress=partial(measured, before)).rows
        values[name] = {figure: [row[figure] for row in rows] for figure in FIGURES[:3]}
        values[name]["clip_score"] = clip_score(seen, texts).tolist()
        values[name]["seconds"] = [entry["seconds"] for entry in entries[name]]
        plain = values[UNPATCHED]["seconds"]
        values[name]["time"] = [a / b for a, b in zip(values[name]["seconds"], plain, strict=True)]
    names = [way.name for way in ways]
    table: dict[str, dict[str, Any]] = {
        way.name: {"spec": way.spec, "seconds": float(np.median(values[way.name]["seconds"]))}
        for way in ways
    }
    for figure in (*FIGURES, "time"):
        columns = np.stack([values[name][figure] for name in names], 1)
        for name, found in zip(names, bootstrap(columns, prompts), strict=True):
            table[name][figure] = _plain(found)
    if protocol.replicates > 1:
        which = np.array([protocol.replicate(i) for i in kept])
        for name in names:
            table[name]["replicates"] = {
                figure: [
                    float(np.mean(np.array(values[name][figure])[which == r]))
                    for r in range(protocol.replicates)
                ]
                for figure in (*FIGURES, "time")
            }
    notes = _distances(protocol, features, table, prompts, judges, cache, progress)
    if hidden := len(every) - len(kept):
        notes.append(f"{hidden} of {len(every)} images are left out: in a variant {HIDDEN}")
    if cut:
        notes.append(f"{len(cut)} of {len(prompts)} prompts are longer than CLIP reads")
    if note := small_sample_warning(prompts):
        notes.append(note)
    return {
        "protocol": protocol.model_dump(),
        "images_per_variant": len(wanted),
        "variants": table,
        "differences": _differences(values, names, prompts),
        "front": front(table),
        "notes": notes,
        "values": values,
        "prompts": prompts,
        "made_with": _versions(entries),
    }


def _made(out: Path, way: Variant, count: int) -> list[tuple[Picture, dict[str, Any]]]:
    """The pictures of a variant with their entries, in the order of their numbers."""
    folder = out / "images" / way.name
    found = {
        entry["id"]: (picture, entry)
        for picture, entry in zip(pictures(folder), read_manifest(folder / MANIFEST), strict=True)
    }
    missing = [number for number in range(count) if number not in found]
    if missing:
        raise EvaluationError(
            f"{folder} lacks {len(missing)} of {count} images; run it again to make them"
        )
    return [found[number] for number in range(count)]


def _visible(variants: list[list[Picture]]) -> list[int]:
    """The numbers of the images that are hidden in no variant, since variants are paired."""
    numbers = range(len(variants[0]))
    kept = [i for i in numbers if not any(found[i].hidden for found in variants)]
    if not kept:
        raise EvaluationError(f"{HIDDEN}: each of {len(numbers)} images in one variant or another")
    return kept


def _distances(
    protocol: Protocol,
    features: dict[str, Any],
    table: dict[str, dict[str, Any]],
    prompts: list[str],
    judges: Judges,
    cache: Path | None,
    progress: Progress,
) -> list[str]:
    """FID and KID of each variant into the table; returns what to say of them."""
    count, dimensions = features[UNPATCHED].shape
    if count < ENOUGH:
        return [f"{count} images a variant are too few for FID and KID; {ENOUGH} are the least"]
    of_unpatched = judges.reference is None
    if judges.reference is None:
        reference = features[UNPATCHED]
    else:
        real = judges.reference
        found = extract(
            real,
            judges.features,
            protocol.reading,
            folder=cache,
            progress=lambda done: progress("images of the reference", done, len(real)),
        )
        reference = found.values
    for name, metric in (("fid", fid), ("kid", kid)):
        every = {way: metric(found, reference) for way, found in features.items()}
        for way, estimate in every.items():
            table[way][name] = _plain(estimate.interval)
            if not of_unpatched and way != UNPATCHED:
                paired = difference(estimate, every[UNPATCHED], prompts)
                table[way][f"{name}_difference"] = _called(paired)
    note = fid_bias_warning(count, dimensions)
    return [note] if note else []


def _differences(
    values: dict[str, dict[str, list[float]]], names: list[str], prompts: list[str]
) -> dict[str, dict[str, dict[str, Any]]]:
    """For each figure and each two variants the mean difference, paired by prompt and seed."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for figure in FIGURES:
        # To be alike to oneself is no figure: unpatched takes part in the CLIP score alone.
        some = [name for name in names if figure == "clip_score" or name != UNPATCHED]
        two = [(a, b) for a in some for b in some if a < b]
        if not two:
            continue
        measured = {name: np.array(values[name][figure]) for name in some}
        columns = np.stack([measured[a] - measured[b] for a, b in two], 1)
        for (a, b), interval in zip(two, bootstrap(columns, prompts), strict=True):
            swapped = Interval(-interval.mean, -interval.high, -interval.low)
            of_figure = found.setdefault(figure, {})
            of_figure.setdefault(a, {})[b] = _called(interval)
            of_figure.setdefault(b, {})[a] = _called(swapped)
    return found


def _called(interval: Interval) -> dict[str, Any]:
    return {**_plain(interval), "differs": interval.excludes_zero}


def _plain(interval: Interval) -> dict[str, Any]:
    """For JSON, which knows no infinity: ends that are not known are None."""
    return {k: v if math.isfinite(v) else None for k, v in interval._asdict().items()}


def front(table: dict[str, dict[str, Any]], figure: str = "psnr") -> list[str]:
    """Variants than which no other is both faster and better, from fast to slow.

    Args:
        table: Of each variant ``time`` and the figure, each with a ``mean``.
        figure: What counts as better, the higher.

    Example:
        >>> row = lambda time, psnr: {"time": {"mean": time}, "psnr": {"mean": psnr}}
        >>> front({"a": row(0.5, 30), "b": row(0.6, 29), "c": row(0.7, 40)})
        ['a', 'c']
    """
    found: list[str] = []
    best = -np.inf
    some = [name for name in table if name != UNPATCHED]
    for name in sorted(some, key=lambda n: (table[n]["time"]["mean"], -table[n][figure]["mean"])):
        if table[name][figure]["mean"] > best:
            best = table[name][figure]["mean"]
            found.append(name)
    return found


def _versions(entries: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """On what the images were made and measured."""
    flat = [entry for of_one in entries.values() for entry in of_one]
    seen = {
        key: sorted({str(entry[key]) for entry in flat}) for key in ("device", "dtype", "torch")
    }
    packages = ("agentsd", "diffusers", "transformers", "torchmetrics", "tomesd", "DeepCache")
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        **{key: ", ".join(found) for key, found in seen.items()},
        **versions,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
