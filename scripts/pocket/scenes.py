"""The pocket world: scenes of flat shapes, their captions and their pictures.

A scene is what the caption says plus a seed for what it leaves open (exact tints, rotation, size,
position, stripes). Repeated shapes share everything except the position: long-range structure that
a model can only preserve through self-attention. Stripes are four to six latent cells wide, so only
attention over the fine grid can copy their phase.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

COLOURS = {
    "red": (0.86, 0.10, 0.12),
    "orange": (0.97, 0.52, 0.06),
    "yellow": (0.97, 0.89, 0.14),
    "green": (0.12, 0.62, 0.22),
    "blue": (0.12, 0.27, 0.86),
    "purple": (0.55, 0.16, 0.66),
    "white": (0.94, 0.94, 0.94),
    "black": (0.06, 0.06, 0.06),
}
TINT = 0.015  # largest shift of a colour channel, either way

# corners, inner radius over outer radius, outer radius over nominal size (evens out the areas),
# angle of the first corner from the top
SHAPES = {
    "circle": (0, 1.0, 1.0, 0.0),
    "square": (4, math.cos(math.pi / 4), 1.22, math.pi / 4),
    "triangle": (3, math.cos(math.pi / 3), 1.32, 0.0),
    "star": (5, 0.45, 1.32, 0.0),
}
TURN = math.radians(12)  # largest rotation, either way
STRIPED = 0.4  # share of repeated shapes that have stripes
PERIOD = (1 / 16, 1 / 11)  # of stripes, in canvas sides: 4 to 6 latent cells

PAIRS = {"above": "above", "below": "below", "left": "to the left of", "right": "to the right of"}
NUMBERS = {2: "two", 3: "three", 4: "four"}
LAYOUTS = {  # share of the training scenes
    "single": 0.20,
    "pair": 0.26,
    "line": 0.28,
    "ring": 0.08,
    "grid": 0.07,
    "mirrored": 0.11,
}


@dataclass(frozen=True)
class Item:
    """One thing that a caption names."""

    colour: str
    shape: str


@dataclass(frozen=True)
class Scene:
    """What a caption says, and a seed for the rest.

    Args:
        layout: "single", a key of PAIRS, "row", "column", "ring", "grid" or "mirrored".
        items: two for pairs and mirrored scenes, else one.
        count: shapes of the first item: 2 to 4 in rows and columns, fixed by the layout elsewhere.
        background: a colour that no item has.
        seed: decides tints, rotation, size, place and stripes.
    """

    layout: str
    items: tuple[Item, ...]
    count: int
    background: str
    seed: int


@dataclass(frozen=True)
class Stripes:
    """Bands of another shade, fixed to a shape: period in canvas sides, phase, angle in radians."""

    period: float
    phase: float
    angle: float


@dataclass(frozen=True)
class Placed:
    """A shape on the canvas: centre and size in units of the canvas side, angle in radians."""

    shape: str
    rgb: tuple[float, float, float]
    x: float
    y: float
    size: float
    angle: float
    stripes: Stripes | None = None


def sample_scene(rng: np.random.Generator) -> Scene:
    """Draw a scene from the training distribution."""
    kind = rng.choice(list(LAYOUTS), p=list(LAYOUTS.values()))
    colours = [str(c) for c in rng.permutation(list(COLOURS))]
    shapes = [str(s) for s in rng.choice(list(SHAPES), 2)]
    background, first, second = colours[:3]
    if shapes[0] != shapes[1] and rng.random() < 0.15:
        second = first  # so that colour alone never distinguishes the two items
    items = (Item(first, shapes[0]), Item(second, shapes[1]))
    seed = int(rng.integers(2**31))
    if kind == "pair":
        return Scene(str(rng.choice(list(PAIRS))), items, 1, background, seed)
    if kind == "mirrored":
        return Scene("mirrored", items, 2, background, seed)
    if kind == "line":
        layout, count = str(rng.choice(["row", "column"])), int(rng.choice([2, 2, 2, 3, 3, 3, 4]))
        return Scene(layout, items[:1], count, background, seed)
    return Scene(kind, items[:1], {"single": 1, "ring": 6, "grid": 9}[kind], background, seed)


def caption(scene: Scene) -> str:
    """The caption of a scene."""
    names = [f"{item.colour} {item.shape}" for item in scene.items]
    if scene.layout == "single":
        what = f"a {names[0]}"
    elif scene.layout in PAIRS:
        what = f"a {names[0]} {PAIRS[scene.layout]} a {names[1]}"
    elif scene.layout in ("row", "column"):
        what = f"{NUMBERS[scene.count]} {names[0]}s in a {scene.layout}"
    elif scene.layout == "ring":
        what = f"a ring of six {names[0]}s"
    elif scene.layout == "grid":
        what = f"a 3 by 3 grid of {names[0]}s"
    else:
        what = f"two mirrored {names[0]}s above two mirrored {names[1]}s"
    return f"{what} on a {scene.background} background".replace("a orange", "an orange")


def place(scene: Scene) -> tuple[tuple[float, float, float], list[Placed]]:
    """Decide what the caption leaves open.

    Returns:
        The background's RGB in 0..1 and the shapes to draw, in order.
    """
    rng = np.random.default_rng(scene.seed)

    def tint(colour: str) -> tuple[float, float, float]:
        shift = rng.uniform(-TINT, TINT, 3)
        return tuple(np.clip(np.array(COLOURS[colour]) + shift, 0, 1).tolist())

    background = tint(scene.background)
    looks = [(item.shape, tint(item.colour)) for item in scene.items]
    turns = rng.uniform(-TURN, TURN, 2)
    u = rng.uniform
    bands = [Stripes(u(*PERIOD), u(0, math.tau), u(0, math.pi)) for _ in looks]
    striped = rng.random(2) < STRIPED * (scene.layout != "single" and scene.layout not in PAIRS)

    def put(which: int, x: float, y: float, size: float, flip: bool = False) -> Placed:
        (shape, rgb), turn, stripes = looks[which], turns[which], bands[which]
        if flip:
            turn, stripes = -turn, replace(stripes, angle=math.pi - stripes.angle)
        return Placed(shape, rgb, x, y, size, turn, stripes if striped[which] else None)

    if scene.layout == "single":
        size = u(0.22, 0.28)
        return background, [put(0, u(0.46, 0.54), u(0.46, 0.54), size)]
    if scene.layout in PAIRS:
        near, far = u(0.262, 0.288), u(0.712, 0.738)
        if scene.layout in ("below", "right"):
            near, far = far, near
        across, size = u(0.47, 0.53, 2), u(0.15, 0.165)
        spots = [(across[0], near), (across[1], far)]
        if scene.layout in ("left", "right"):
            spots = [(y, x) for x, y in spots]
        return background, [put(i, *spot, size) for i, spot in enumerate(spots)]
    if scene.layout in ("row", "column"):
        gap, size = {2: (0.46, 0.16), 3: (0.31, 0.115), 4: (0.24, 0.09)}[scene.count]
        gap, size, across = gap * u(0.97, 1.01), size * u(0.95, 1.02), u(0.45, 0.55)
        steps = [0.5 + gap * (i - (scene.count - 1) / 2) for i in range(scene.count)]
        row = scene.layout == "row"
        return background, [put(0, *((s, across) if row else (across, s)), size) for s in steps]
    if scene.layout == "ring":
        radius, size, phase = u(0.33, 0.345), u(0.108, 0.116), u(-0.1, 0.1)
        angles = [phase + math.tau * i / 6 for i in range(6)]
        spots = [(0.5 + radius * math.sin(a), 0.5 - radius * math.cos(a)) for a in angles]
        return background, [put(0, *spot, size) for spot in spots]
    if scene.layout == "grid":
        gap, size = u(0.295, 0.31), u(0.108, 0.114)
        steps = [0.5 - gap, 0.5, 0.5 + gap]
        return background, [put(0, x, y, size) for y in steps for x in steps]
    size, shapes = u(0.14, 0.155), []
    for i, y in enumerate((u(0.26, 0.29), u(0.71, 0.74))):
        x = u(0.22, 0.28)
        shapes += [put(i, x, y, size), put(i, 1 - x, y, size, flip=True)]
    return background, shapes


def close_up(shapes: list[Placed], left: float, top: float, side: float) -> list[Placed]:
    """Shapes as seen through a square window.

    Args:
        shapes: on the whole canvas.
        left: the window's left edge in canvas sides.
        top: its upper edge.
        side: its side; the picture of half the size has the same scale of pixels at 0.5.
    """
    return [
        replace(
            shape,
            x=(shape.x - left) / side,
            y=(shape.y - top) / side,
            size=shape.size / side,
            stripes=shape.stripes and replace(shape.stripes, period=shape.stripes.period / side),
        )
        for shape in shapes
    ]


def _shade(
    rgb: np.ndarray, stripes: Stripes | None, x: np.ndarray, y: np.ndarray, size: int
) -> np.ndarray:
    """The colour at each point of a shape, [..., 3]; x and y in pixels from its centre."""
    if stripes is None:
        return rgb
    dark = rgb.mean() < 0.2
    other = rgb + 0.3 * (1 - rgb) if dark else 0.7 * rgb
    period = stripes.period * size
    along = x * math.cos(stripes.angle) + y * math.sin(stripes.angle)
    wave = np.sin(math.tau * along / period + stripes.phase) * period / math.tau
    return rgb + np.clip(0.5 + wave, 0, 1)[..., None] * (other - rgb)


def _distance(shape: str, x: np.ndarray, y: np.ndarray, size: float, angle: float) -> np.ndarray:
    """Signed distance to the nearest edge's line, negative inside; x to the right, y down."""
    corners, inner, scale, first = SHAPES[shape]
    outer = size * scale
    radius = np.hypot(x, y)
    if not corners:
        return radius - outer
    # Fold the plane onto the wedge between a corner and the middle (or notch) that follows it.
    half = math.pi / corners
    fold = np.abs((np.arctan2(x, -y) - angle - first + half) % (2 * half) - half)
    end = (inner * outer * math.cos(half), inner * outer * math.sin(half))
    edge = (end[0] - outer, end[1])
    normal = (edge[1] / math.hypot(*edge), -edge[0] / math.hypot(*edge))
    return (radius * np.cos(fold) - outer) * normal[0] + radius * np.sin(fold) * normal[1]


def render(scene: Scene, size: int) -> np.ndarray:
    """Draw a scene; see `draw`."""
    return draw(*place(scene), size)


def draw(background: tuple[float, float, float], shapes: list[Placed], size: int) -> np.ndarray:
    """Draw shapes on a background, antialiased.

    Args:
        background: RGB in 0..1.
        shapes: what to draw, in order.
        size: side of the square image in pixels; the layout is the same at every size.

    Returns:
        uint8 array [size, size, 3].
    """
    image = np.empty((size, size, 3), np.float32)
    image[:] = background
    for shape in shapes:
        reach = shape.size * SHAPES[shape.shape][2] * size + 2
        cx, cy = shape.x * size - 0.5, shape.y * size - 0.5
        left, right, top, bottom = (
            min(size, max(0, int(edge)))
            for edge in (cx - reach, cx + reach + 2, cy - reach, cy + reach + 2)
        )
        y, x = np.mgrid[top:bottom, left:right].astype(np.float32)
        edge = _distance(shape.shape, x - cx, y - cy, shape.size * size, shape.angle)
        cover = np.clip(0.5 - edge, 0, 1)[..., None]
        patch = image[top:bottom, left:right]
        rgb = _shade(np.array(shape.rgb, np.float32), shape.stripes, x - cx, y - cy, size)
        patch += cover * (rgb - patch)
    return (image * 255 + 0.5).astype(np.uint8)


def shape_map(shapes: list[Placed], cells: int) -> np.ndarray:
    """The shape that touches each cell of a coarse grid.

    Returns:
        int64 array [cells, cells]: 0 for background alone, else 1 + the shape's place in SHAPES.
    """
    found = np.zeros((cells, cells), np.int64)
    y, x = (np.mgrid[:cells, :cells] + 0.5) / cells
    for shape in shapes:
        edge = _distance(shape.shape, x - shape.x, y - shape.y, shape.size, shape.angle)
        found[edge < 0.5 / cells] = 1 + list(SHAPES).index(shape.shape)
    return found


def labels(scene: Scene) -> list[int]:
    """The contents of the picture, as class indices.

    Layout with count, background, and each item's colour and shape (the number after the last class
    where there is no second item). The upper or left one of a pair counts as the first: "a below b"
    and "b above a" are one picture.
    """
    layout, items = scene.layout, scene.items
    if layout in ("below", "right"):
        layout, items = {"below": "above", "right": "left"}[layout], items[::-1]
    layouts = [
        "single",
        "above",
        "left",
        *(f"{lay}{n}" for lay in ("row", "column") for n in NUMBERS),
    ]
    layouts += ["ring", "grid", "mirrored"]
    lined = layout in ("row", "column")
    colours, shapes = list(COLOURS), list(SHAPES)
    found = [layouts.index(f"{layout}{scene.count}" if lined else layout)]
    found.append(colours.index(scene.background))
    for item in (*items, None)[:2]:
        found.append(colours.index(item.colour) if item else len(colours))
        found.append(shapes.index(item.shape) if item else len(shapes))
    return found


LABEL_CLASSES = (12, len(COLOURS), *(len(COLOURS) + 1, len(SHAPES) + 1) * 2)
