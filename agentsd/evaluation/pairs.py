"""Similarity of paired images: PSNR, SSIM, LPIPS and CLIP cosine, and sheets that show pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from ..errors import EvaluationError
from ..generation.image_files import side_by_side
from ..similarity import psnr
from .features import Clip, extract
from .features.lpips import Lpips
from .features.storage import FeatureCache, cache_folder
from .image_sets import ImageEntry
from .metrics import cosine_similarity, ssim
from .reading import ReadOptions, read_image


class Pair(NamedTuple):
    """An image, and the reference that it is compared with."""

    image: ImageEntry
    reference: ImageEntry


def pair_images(images: list[ImageEntry], references: list[ImageEntry]) -> list[Pair]:
    """Match images by prompt and seed if manifests give them, otherwise by file name.

    Raises:
        EvaluationError: If an image has no counterpart, or two have the same one.
    """
    has_seeds = all(e.prompt is not None and e.seed is not None for e in [*images, *references])

    def by_key(entries: list[ImageEntry]) -> dict[Any, ImageEntry]:
        keyed = {(e.prompt, e.seed) if has_seeds else PurePath(e.name).name: e for e in entries}
        if len(keyed) < len(entries):
            what = "prompt and seed" if has_seeds else "file name"
            raise EvaluationError(f"two images have the same {what}; it must be unique")
        return keyed

    ours, theirs = by_key(images), by_key(references)
    unmatched = [*(ours.keys() - theirs.keys()), *(theirs.keys() - ours.keys())]
    if unmatched:
        first = (ours | theirs)[sorted(unmatched, key=str)[0]]
        raise EvaluationError(
            f"{len(images)} images and {len(references)} to compare with: {len(unmatched)} have no "
            f"counterpart, such as {first.name}"
        )
    return [Pair(image, theirs[key]) for key, image in ours.items()]


class Comparison(NamedTuple):
    """The metrics of each pair, and what was skipped."""

    rows: list[dict[str, Any]]
    skipped: list[str]


def compare_pairs(
    pairs: list[Pair],
    clip: Clip,
    options: ReadOptions | None = None,
    *,
    lpips: Lpips | None = None,
    folder: Path | None = None,
    progress: Callable[[int], object] = lambda done: None,
) -> Comparison:
    """Measure the similarity of each pair.

    Args:
        pairs: The pairs, from :func:`pair_images`.
        clip: The CLIP whose image embeddings are compared.
        options: How to read the images.
        lpips: The LPIPS network; without it, LPIPS is left out.
        folder: Folder of the cache of features and SSIM values.
        progress: Called with the number of pairs done.

    Returns:
        One row per pair with ``image`` and ``reference`` (names), ``prompt``, ``seed``, ``psnr``
        (dB), ``ssim``, ``cosine`` and, if measured, ``lpips``.

    Raises:
        EvaluationError: If an image cannot be used and such pairs are not skipped (names the
            first), or if no pair is left.
    """
    options = options or ReadOptions()
    rows: list[dict[str, Any]] = []
    skipped: list[str] = []
    measured: list[Pair] = []
    with _cached_ssim(folder or cache_folder()) as cached_ssim:
        for number, pair in enumerate(pairs, start=1):
            try:
                (a, digest_a), (b, digest_b) = _read_pair(pair, options)
            except EvaluationError as error:
                if not options.skip_bad:
                    raise EvaluationError(f"{error} (--skip-bad skips such pairs)") from None
                skipped.append(str(error))
                continue
            x, y = np.asarray(a), np.asarray(b)
            row = {
                "image": pair.image.name,
                "reference": pair.reference.name,
                "prompt": pair.image.prompt,
                "seed": pair.image.seed,
                "psnr": psnr(x, y),
                "ssim": cached_ssim(f"{digest_a}-{digest_b}{options.cache_suffix}", x, y),
            }
            rows.append(row | ({} if lpips is None else {"lpips": lpips.between(x, y)}))
            measured.append(pair)
            progress(number)
    if not measured:
        raise EvaluationError(f"none of {len(pairs)} pairs can be used; the first: {skipped[0]}")
    embeddings = (
        extract([pair[side] for pair in measured], clip, options, folder=folder).values
        for side in (0, 1)
    )
    for row, value in zip(rows, cosine_similarity(*embeddings), strict=True):
        row["cosine"] = float(value)
    return Comparison(rows, skipped)


def _read_pair(pair: Pair, options: ReadOptions) -> list[tuple[Image.Image, str]]:
    """Both images, which must have the same size, and the digests of their files."""
    (a, _), (b, _) = both = [read_image(entry, options) for entry in pair]
    if a.size != b.size:
        raise EvaluationError(
            f"{pair.image.name}: is {a.width}×{a.height}, but its counterpart is "
            f"{b.width}×{b.height}; --size N makes all images N×N"
        )
    return both


@contextmanager
def _cached_ssim(folder: Path) -> Iterator[Callable[[str, ArrayLike, ArrayLike], float]]:
    """SSIM by key, cached on disk, since it takes most of a second per pair."""
    cache = FeatureCache(folder / "ssim-gaussian-11-1.5")
    computed: dict[str, float] = {}

    def cached_ssim(key: str, x: ArrayLike, y: ArrayLike) -> float:
        cached = cache.get(key)
        if cached is not None:
            return float(cached[0])
        computed[key] = ssim(x, y)
        return computed[key]

    try:
        yield cached_ssim
    finally:
        if computed:
            cache.put(list(computed), np.array(list(computed.values()))[:, None])


def worst_pairs(pairs: list[Pair], rows: list[dict[str, Any]], count: int = 10) -> Image.Image:
    """A contact sheet of the pairs with the lowest PSNR, lowest first.

    Args:
        pairs: The pairs.
        rows: The metrics of each, as :func:`compare_pairs` returns them.
        count: How many pairs to show.
    """
    by_name = {pair.image.name: pair for pair in pairs}
    options = ReadOptions(convert=True)  # nothing is measured here: any mode and size will do
    strips = []
    for row in sorted(rows, key=lambda row: float(row["psnr"]))[:count]:
        pair = by_name[row["image"]]
        (a, _), (b, _) = read_image(pair.reference, options), read_image(pair.image, options)
        seed = "" if row["seed"] is None else f"seed {row['seed']}, "
        strips.append((f"{seed}reference", a, f"{row['psnr']:.1f} dB", b))
    return contact_sheet(strips)


def contact_sheet(rows: list[tuple[str, Image.Image, str, Image.Image]]) -> Image.Image:
    """Stack pairs of labelled images; small ones are enlarged."""
    strips = []
    for left, a, right, b in rows:
        scale = -(-192 // a.width)
        scaled = (image.resize((a.width * scale, a.height * scale), 0) for image in (a, b))
        strips.append(side_by_side(dict(zip((left, right), scaled, strict=True))))
    width, height = max(s.width for s in strips), sum(s.height for s in strips)
    sheet = Image.new("RGB", (width, height), "white")
    top = 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    return sheet
