"""Pairs of images one below the other, with labels, for the eye."""

from __future__ import annotations

from typing import Any

from PIL import Image

from ..generation.image_files import side_by_side
from .pairs import Pair
from .reading import ReadOptions, read_image


def contact_sheet(rows: list[tuple[str, Image.Image, str, Image.Image]]) -> Image.Image:
    """Stack pairs of images, each image below its label; small ones are enlarged."""
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


def worst_pairs(pairs: list[Pair], rows: list[dict[str, Any]], count: int = 10) -> Image.Image:
    """A contact sheet of the pairs with the lowest PSNR, lowest first.

    Args:
        pairs: The pairs.
        rows: The metrics of each, as :func:`~agentsd.evaluation.pairs.compare_pairs` returns them.
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
