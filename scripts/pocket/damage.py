"""Renders with increasing damage, which the scorer's features must detect."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from PIL import Image, ImageFilter

from .scenes import COLOURS, Placed, Scene, draw, place

SIZE = 256


def _pixels(change: Callable[[Image.Image, np.random.Generator], Image.Image]) -> Callable:
    def damaged(scene: Scene, rng: np.random.Generator) -> Image.Image:
        return change(Image.fromarray(draw(*place(scene), SIZE)), rng)

    return damaged


def _noise(strength: float) -> Callable:
    """Gaussian noise of a standard deviation, where 1 is the range of a channel."""

    def change(image: Image.Image, rng: np.random.Generator) -> Image.Image:
        noisy = np.asarray(image, np.float32) + 255 * strength * rng.normal(size=(SIZE, SIZE, 3))
        return Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8))

    return _pixels(change)


def _blur(radius: float) -> Callable:
    """Gaussian blur of a standard deviation in pixels."""
    return _pixels(lambda image, _: image.filter(ImageFilter.GaussianBlur(radius)))


def _some(share: float, change: Callable[[Placed, np.random.Generator], Placed | None]) -> Callable:
    """A share of the shapes is changed, or dropped where the change gives None."""

    def damaged(scene: Scene, rng: np.random.Generator) -> Image.Image:
        background, shapes = place(scene)
        hit = rng.random(len(shapes)) < share
        drawn = [change(s, rng) if h else s for s, h in zip(shapes, hit, strict=True)]
        return Image.fromarray(draw(background, [s for s in drawn if s], SIZE))

    return damaged


def _recoloured(shape: Placed, rng: np.random.Generator) -> Placed:
    near = [c for c in COLOURS.values() if np.abs(np.subtract(c, shape.rgb)).max() < 0.1]
    others = [c for c in COLOURS.values() if c not in near]
    return replace(shape, rgb=others[int(rng.integers(len(others)))])


def _moved(shape: Placed, rng: np.random.Generator) -> Placed:
    x, y = rng.uniform(0.15, 0.85, 2)
    return replace(shape, x=float(x), y=float(y))


LADDERS: dict[str, dict[str, Callable[[Scene, np.random.Generator], Image.Image]]] = {
    "noise": {f"sigma {s}": _noise(s) for s in (0.0, 0.2, 0.4, 0.8)},
    "blur": {f"{r} pixels": _blur(r) for r in (0, 6, 12, 24)},
    "missing object": {f"{s:.0%}": _some(s, lambda *_: None) for s in (0.0, 0.2, 0.4, 1.0)},
    "wrong colour": {f"{s:.0%}": _some(s, _recoloured) for s in (0.0, 0.3, 0.6)},
    "swapped places": {f"{s:.0%}": _some(s, _moved) for s in (0.0, 0.3, 0.6, 1.0)},
}
"""Kinds of damage, each with increasing amounts.

The scorer reads images at 64 pixels, at which a blur of a few pixels and noise of a few percent
vanish, so the amounts start above that. Wrong colours end at 60 %: once every shape of a ring has a
different colour from the next, more changes make it no more wrong.
"""
