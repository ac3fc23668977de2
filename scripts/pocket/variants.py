"""Scenes that differ from a given one in exactly one attribute of the caption."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .scenes import COLOURS, PAIRS, SHAPES, Item, Scene

ATTRIBUTES = ("colour", "background", "shape", "count", "layout", "binding")


def variants_of(scene: Scene, attribute: str) -> list[Scene]:
    """List every scene that differs from this one in one attribute.

    The seed of what captions leave open is kept.

    Args:
        scene: the scene to change.
        attribute: one of ATTRIBUTES; "binding" swaps the two items' colours, "layout" turns rows
            into columns and changes the relation of a pair.

    Returns:
        The changed scenes, none where the scene has no such attribute to change.

    Raises:
        ValueError: The attribute is unknown.
    """
    if attribute == "background":
        taken = {scene.background, *(item.colour for item in scene.items)}
        return [replace(scene, background=c) for c in COLOURS if c not in taken]
    if attribute == "count":
        counts = (2, 3, 4) if scene.layout in ("row", "column") else ()
        return [replace(scene, count=n) for n in counts if n != scene.count]
    if attribute == "layout":
        family = next((f for f in (tuple(PAIRS), ("row", "column")) if scene.layout in f), ())
        return [replace(scene, layout=name) for name in family if name != scene.layout]
    if attribute == "binding":
        return _swapped(scene)
    if attribute not in ("colour", "shape"):
        raise ValueError(f"attribute {attribute!r} is none of {', '.join(ATTRIBUTES)}")
    found = []
    for which, item in enumerate(scene.items):
        if attribute == "colour":
            taken = {scene.background, item.colour}
            options = [Item(c, item.shape) for c in COLOURS if c not in taken]
        else:
            options = [Item(item.colour, s) for s in SHAPES if s != item.shape]
        for option in options:
            items = (*scene.items[:which], option, *scene.items[which + 1 :])
            if len(set(items)) == len(items):  # two identical items have no relation
                found.append(replace(scene, items=items))
    return found


def _swapped(scene: Scene) -> list[Scene]:
    if len(scene.items) < 2:
        return []
    first, second = scene.items
    if first.colour == second.colour or first.shape == second.shape:
        return []  # either nothing changes, or only the layout
    return [
        replace(scene, items=(Item(second.colour, first.shape), Item(first.colour, second.shape)))
    ]


def draw_variants(scene: Scene, count: int, rng: np.random.Generator) -> list[Scene]:
    """Draw `count` variants (at most 3) of different attributes, in random order."""
    found = []
    for attribute in rng.permutation(ATTRIBUTES):
        options = variants_of(scene, str(attribute))
        if options and len(found) < count:
            found.append(options[int(rng.integers(len(options)))])
    return found
