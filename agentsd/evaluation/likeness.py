"""How like each image is to its counterpart: PSNR, SSIM and the cosine of CLIP's embeddings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from PIL import Image

from ..errors import EvaluationError
from ..generation.image_files import side_by_side
from .features import Cache, Clip, cache_folder, extract
from .lpips import Lpips
from .metrics import cosine
from .pictures import Picture, digest_of
from .reading import Reading, decoded, opened


def psnr(a: ArrayLike, b: ArrayLike) -> float:
    """Peak signal-to-noise ratio of two 8-bit images of one shape, in dB.

    Equal images count as if a single value differed by one, so that means stay finite: 101 dB at
    256 × 256 pixels.

    Example:
        >>> round(psnr(np.full((8, 8, 3), 100), np.full((8, 8, 3), 110)), 1)
        28.1
    """
    difference = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    error = max(float(np.square(difference).sum()), 1.0) / difference.size
    return 10 * math.log10(255**2 / error)


def ssim(a: ArrayLike, b: ArrayLike) -> float:
    """Structural similarity (Wang et al., 2004) of two 8-bit images ``[H, W, 3]``, by torchmetrics.

    Its window is a Gaussian of 11 pixels, sigma 1.5; sides below 11 pixels are refused.

    Returns:
        At most 1, for equal images.

    Raises:
        EvaluationError: If torchmetrics is missing or the images are too small.

    Example:
        >>> x = np.random.default_rng(0).integers(0, 256, (16, 16, 3))
        >>> round(ssim(x, x), 6)
        1.0
    """
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError as error:
        raise EvaluationError(
            f"SSIM needs torchmetrics: pip install torchmetrics ({error})"
        ) from None
    x, y = (torch.from_numpy(np.asarray(z, np.float64)).permute(2, 0, 1)[None] for z in (a, b))
    if min(x.shape[2:]) < 11:
        raise EvaluationError(f"SSIM needs images of 11 pixels or more (got {tuple(x.shape[2:])})")
    return float(structural_similarity_index_measure(x, y, data_range=255.0))


class Pair(NamedTuple):
    """An image and what it is compared with."""

    image: Picture
    reference: Picture


def pairs(images: list[Picture], references: list[Picture]) -> list[Pair]:
    """Match images by prompt and seed where manifests give them, else by file name.

    Raises:
        EvaluationError: If an image has no counterpart, or two have the same.
    """
    both = [*images, *references]
    seeded = all(p.prompt is not None and p.seed is not None for p in both)

    def keyed(found: list[Picture]) -> dict[Any, Picture]:
        keys = {(p.prompt, p.seed) if seeded else PurePath(p.name).name: p for p in found}
        if len(keys) < len(found):
            what = "prompt and seed" if seeded else "file name"
            raise EvaluationError(f"two images have the same {what}; each needs its own")
        return keys

    ours, theirs = keyed(images), keyed(references)
    lonely = [*(ours.keys() - theirs.keys()), *(theirs.keys() - ours.keys())]
    if lonely:
        first = (ours | theirs)[sorted(lonely, key=str)[0]]
        raise EvaluationError(
            f"{len(images)} images and {len(references)} to compare with: {len(lonely)} have no "
            f"counterpart, such as {first.name}"
        )
    return [Pair(picture, theirs[key]) for key, picture in ours.items()]


class Likeness(NamedTuple):
    """Figures of each pair, and what was left out."""

    rows: list[dict[str, Any]]
    bad: list[str]


def likeness(
    found: list[Pair],
    clip: Clip,
    reading: Reading | None = None,
    *,
    lpips: Lpips | None = None,
    folder: Path | None = None,
    progress: Callable[[int], object] = lambda done: None,
) -> Likeness:
    """PSNR, SSIM and the cosine of CLIP's image embeddings, of each pair.

    Args:
        found: What :func:`pairs` matched.
        clip: Whose embeddings to compare.
        reading: How to read the images.
        lpips: Measures that as well, where given.
        folder: Of the cache, of features and of SSIM, which takes most of a second a pair.
        progress: Called with the number of pairs that are done.

    Returns:
        For each pair its ``image`` and ``reference`` (names), ``prompt``, ``seed``, ``psnr``,
        ``ssim``, ``cosine`` and perhaps ``lpips``.

    Raises:
        EvaluationError: Names the first image that cannot be used, unless bad ones are skipped.
    """
    reading = reading or Reading()
    rows: list[dict[str, Any]] = []
    bad: list[str] = []
    kept: list[Pair] = []
    with _remembered(folder or cache_folder()) as similarity:
        for number, pair in enumerate(found, start=1):
            try:
                (a, of_a), (b, of_b) = (_read(picture, reading) for picture in pair)
                if a.size != b.size:
                    raise EvaluationError(
                        f"{pair.image.name}: is {a.width}×{a.height}, its counterpart "
                        f"{b.width}×{b.height}; --size N makes all N×N"
                    )
            except EvaluationError as error:
                if not reading.skip_bad:
                    raise EvaluationError(f"{error} (--skip-bad leaves such pairs out)") from None
                bad.append(str(error))
                continue
            names = {"image": pair.image.name, "reference": pair.reference.name}
            known = {"prompt": pair.image.prompt, "seed": pair.image.seed}
            x, y = np.asarray(a), np.asarray(b)
            alike = similarity(f"{of_a}-{of_b}{reading.manner}", x, y)
            rows.append({**names, **known, "psnr": psnr(x, y), "ssim": alike})
            if lpips is not None:
                rows[-1]["lpips"] = lpips.between(x, y)
            kept.append(pair)
            progress(number)
    if not kept:
        raise EvaluationError(f"none of {len(found)} pairs can be used; the first: {bad[0]}")
    ours, theirs = (
        extract([pair[side] for pair in kept], clip, reading, folder=folder).values
        for side in (0, 1)
    )
    for row, value in zip(rows, cosine(ours, theirs), strict=True):
        row["cosine"] = float(value)
    return Likeness(rows, bad)


@contextmanager
def _remembered(folder: Path) -> Iterator[Callable[[str, ArrayLike, ArrayLike], float]]:
    """SSIM by a key, which takes most of a second a pair: what was computed is kept on disk."""
    known = Cache(folder / "ssim-gaussian-11-1.5")
    fresh: dict[str, float] = {}

    def similarity(key: str, x: ArrayLike, y: ArrayLike) -> float:
        kept = known.get(key)
        if kept is not None:
            return float(kept[0])
        fresh[key] = ssim(x, y)
        return fresh[key]

    try:
        yield similarity
    finally:
        if fresh:
            known.put(list(fresh), np.array(list(fresh.values()))[:, None])


def _read(picture: Picture, reading: Reading) -> tuple[Image.Image, str]:
    """An image, and the digest of its file."""
    data = picture.read()
    digest = digest_of(picture, data)
    return decoded(picture.name, opened(picture.name, data, reading), reading), digest


def sheet(rows: list[tuple[str, Image.Image, str, Image.Image]]) -> Image.Image:
    """Pairs one under the other, each image under its label; small ones are enlarged."""
    strips = []
    for left, a, right, b in rows:
        times = -(-192 // a.width)
        shown = (image.resize((a.width * times, a.height * times), 0) for image in (a, b))
        strips.append(side_by_side(dict(zip((left, right), shown, strict=True))))
    width, height = max(s.width for s in strips), sum(s.height for s in strips)
    whole = Image.new("RGB", (width, height), "white")
    top = 0
    for strip in strips:
        whole.paste(strip, (0, top))
        top += strip.height
    return whole


def worst(found: list[Pair], rows: list[dict[str, Any]], count: int = 10) -> Image.Image:
    """A picture of the pairs with the lowest PSNR, the lowest on top."""
    lowest = sorted(rows, key=lambda row: float(row["psnr"]))[:count]
    by_name = {pair.image.name: pair for pair in found}
    # As they are shown, nothing is measured: take any mode and size.
    reading = Reading(convert=True)
    strips = []
    for row in lowest:
        pair = by_name[row["image"]]
        (a, _), (b, _) = _read(pair.reference, reading), _read(pair.image, reading)
        seed = "" if row["seed"] is None else f"seed {row['seed']}, "
        strips.append((f"{seed}reference", a, f"{row['psnr']:.1f} dB", b))
    return sheet(strips)
