"""The figures of ``agentsd evaluate`` for an image set, alone or compared with a reference."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import EvaluationError, MissingPackageError
from ..generation.image_files import prepare_folder, save_image, write_whole
from . import metrics
from .compared_sets import ComparedSets
from .features import lpips
from .features.storage import save_statistics
from .image_sets import HIDDEN, ImageEntry
from .intervals import SMALL_SAMPLE, Interval, bootstrap, small_sample_warning
from .pairs import Pair, compare_pairs, pair_images, worst_pairs

FIGURES = ("fid", "kid", "precision_recall", "clip_score", "paired")


class Figure(NamedTuple):
    """One or several measured figures."""

    values: dict[str, Any]
    """Plain values, for JSON."""
    text: str
    """The figures as text."""


def measurable(sets: ComparedSets) -> list[str]:
    """The members of :data:`FIGURES` that the sets allow; notes why others cannot be measured.

    Raises:
        EvaluationError: If nothing can be measured.
    """
    names = set()
    if sets.statistics is not None:
        names.add("fid")
    elif sets.reference is not None:
        names |= {"fid", "kid", "precision_recall"}
        if why := _unpaired(sets.images, sets.reference):
            sets.note(f"no similarity of pairs: {why}")
        else:
            names.add("paired")
    missing = _without_prompt(sets.images)
    if missing is None:
        names.add("clip_score")
    elif not names:
        raise EvaluationError(f"{missing}; give --prompts, or REFERENCE to compare them with")
    else:
        sets.note(f"no CLIP score: {missing}")
    return [name for name in FIGURES if name in names]


def measure_all(
    sets: ComparedSets, names: Sequence[str], *, infinity: bool = False, out: Path | None = None
) -> Figure:
    """Measure several of :data:`FIGURES`.

    Args:
        sets: The sets to measure.
        names: The figures to measure.
        infinity: As for :func:`measure_fid`.
        out: Folder for the figures of each image (``clip_scores.jsonl``) and each pair.
    """
    if out is not None:
        prepare_folder(out)
    measured: dict[str, Callable[[], Figure]] = {
        "fid": lambda: measure_fid(sets, infinity),
        "kid": lambda: measure_kid(sets),
        "precision_recall": lambda: measure_precision_recall(sets),
        "clip_score": lambda: measure_clip_score(sets, out and out / "clip_scores.jsonl"),
        "paired": lambda: measure_pairs(sets, out),
    }
    figures = [measured[name]() for name in names]
    values = {key: value for figure in figures for key, value in figure.values.items()}
    return Figure(values, "\n".join(figure.text for figure in figures))


def measure_fid(sets: ComparedSets, infinity: bool = False) -> Figure:
    """Fréchet inception distance; ``infinity`` extrapolates it to infinitely many images."""
    ours, reference = (
        (sets.image_features, sets.statistics) if sets.statistics else sets.both_features
    )
    estimate = metrics.fid(ours, reference)
    sets.note(metrics.fid_bias_warning(*ours.shape))
    values, text = _estimate("fid", estimate)
    if infinity:
        limit = metrics.fid_infinity(ours, reference)
        values |= {"fid_infinity": limit.mean, "fid_infinity_interval": list(limit[1:])}
        text += f"; at infinitely many images {_text(limit)}"
    return Figure(values, text)


def measure_kid(sets: ComparedSets) -> Figure:
    """Kernel inception distance."""
    ours, reference = sets.both_features
    if (fewest := min(len(ours), len(reference))) < SMALL_SAMPLE:
        sets.note(f"{fewest} images are too few for KID; use at least {SMALL_SAMPLE}")
    return _estimate("kid", metrics.kid(ours, reference))


def _estimate(name: str, estimate: metrics.Estimate) -> Figure:
    ends = list(estimate.interval[1:])
    values = {name: estimate.value, f"{name}_error": estimate.error, f"{name}_interval": ends}
    return Figure(values, f"{name.upper()} {estimate.value:.4g} ± {estimate.error:.2g}")


def measure_precision_recall(sets: ComparedSets) -> Figure:
    """Improved precision and recall."""
    parts = metrics.precision_recall(*sets.both_features)
    [precision], [recall] = map(bootstrap, parts)
    values = {
        "precision": precision.mean,
        "precision_interval": list(precision[1:]),
        "recall": recall.mean,
        "recall_interval": list(recall[1:]),
    }
    return Figure(values, f"precision {_text(precision)}; recall {_text(recall)}")


def measure_clip_score(sets: ComparedSets, out: Path | None = None) -> Figure:
    """CLIP score; each image's score goes to the file ``out``, as JSON lines."""
    if missing := _without_prompt(sets.images):
        raise EvaluationError(
            f"{missing}; give --prompts FILE, one per line, or NAME.txt beside each image"
        )
    network, features = sets.clip_features()
    texts = [str(picture.prompt) for picture in features.images]
    embedded, cut = network.embed_texts(texts)
    scores = metrics.clip_score(features.values, embedded)
    if cut:
        sets.note(
            f"{len(cut)} of {len(texts)} prompts are longer than CLIP reads; it saw only their "
            "beginnings"
        )
    sets.note(small_sample_warning(texts))
    [mean] = bootstrap(scores, texts)
    if out is not None:
        rows = (
            {"image": p.name, "prompt": p.prompt, "seed": p.seed, "clip_score": float(score)}
            for p, score in zip(features.images, scores, strict=True)
        )
        write_whole(out, _json_lines(rows))
    values = {
        "clip_score": mean.mean,
        "clip_score_interval": _ends(mean),
        "prompts_cut": len(cut),
    }
    return Figure(values, f"CLIP score {_text(mean)}")


def measure_pairs(sets: ComparedSets, out: Path | None = None) -> Figure:
    """Similarity of each image to its counterpart in the reference.

    Each pair's figures and a sheet of the worst ten go to the folder ``out``.
    """
    every = pair_images(sets.images, sets.reference_images)
    pairs = [pair for pair in every if not (pair.image.hidden or pair.reference.hidden)]
    if not pairs:
        raise EvaluationError(f"{HIDDEN}: an image of each of {len(every)} pairs")
    sets.hidden_pairs = len(every) - len(pairs)
    network, perceptual = sets.clip, lpips.load_if_cached()
    if perceptual is None:
        sets.note(f"LPIPS is left out: its weights ({lpips.weights_file()}) are missing")
    with sets.progress("pairs", len(pairs)) as show:
        rows, skipped = compare_pairs(
            pairs, network, sets.reading, lpips=perceptual, folder=sets.cache, progress=show
        )
    sets.leave_out(skipped)
    labels = [row["prompt"] or row["image"] for row in rows]
    sets.note(small_sample_warning(labels))
    figure = _over_pairs(rows, labels)
    if out is not None:
        _write_pairs(out, pairs, rows, figure.values)
    return figure


def _over_pairs(rows: list[dict[str, Any]], labels: list[str]) -> Figure:
    values: dict[str, Any] = {"pairs": len(rows)}
    lines = []
    for name, unit in (("psnr", " dB"), ("ssim", ""), ("cosine", ""), ("lpips", "")):
        if name not in rows[0]:
            continue
        column = [row[name] for row in rows]
        [mean] = bootstrap(column, labels)
        quantiles = [float(q) for q in np.quantile(column, (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1))]
        values[name] = {"mean": mean.mean, "interval": _ends(mean), "quantiles": quantiles}
        lines.append(f"{name} {_text(mean)}{unit}, median {quantiles[3]:.4g}")
    return Figure(values, "\n".join(lines))


def _write_pairs(
    out: Path, pairs: list[Pair], rows: list[dict[str, Any]], values: dict[str, Any]
) -> None:
    prepare_folder(out)
    write_whole(out / "similarity.jsonl", _json_lines(rows))
    write_whole(out / "similarity.json", json.dumps(values, indent=2).encode())
    save_image(worst_pairs(pairs, rows), out / "worst.png")


def write_statistics(sets: ComparedSets, out: Path) -> Figure:
    """Write the images' statistics for FID, in pytorch-fid's format."""
    if out.suffix != ".npz":
        raise EvaluationError(f"{out}: statistics are written as .npz")
    save_statistics(out, metrics.feature_statistics(sets.image_features))
    return Figure({"file": str(out)}, str(out))


def _without_prompt(images: list[ImageEntry]) -> str | None:
    names = [picture.name for picture in images if picture.prompt is None]
    if not names:
        return None
    return f"{len(names)} of {len(images)} images have no prompt, such as {names[0]}"


def _unpaired(images: list[ImageEntry], reference: list[ImageEntry]) -> str | None:
    """Why the images cannot be compared with the reference one by one."""
    if find_spec("torchmetrics") is None:
        return str(MissingPackageError("torchmetrics", "SSIM", "evaluate"))
    try:
        pair_images(images, reference)
    except EvaluationError as error:
        return str(error)
    return None


def _json_lines(rows: Iterable[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _text(interval: Interval) -> str:
    if not math.isfinite(interval.low):
        return f"{interval.mean:.4g} (one prompt only, so no interval)"
    return f"{interval.mean:.4g} [{interval.low:.4g}, {interval.high:.4g}]"


def _ends(interval: Interval) -> list[float] | None:
    """The ends for JSON, which has no infinity."""
    return [interval.low, interval.high] if math.isfinite(interval.low) else None
