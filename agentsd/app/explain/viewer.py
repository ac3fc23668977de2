"""What a patched image's layers do: merged tokens, agents or keys, and what attends to them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import DiffusionPipeline
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from ...patching.processor import Projections
from ..jobs.job import Job
from ..requests.catalog import ImageRequest
from ..requests.request_options import with_options
from .patched_calls import PatchedCall, patchable_layers, watched

Ints = NDArray[np.int32]
Floats = NDArray[np.float64]

MERGED, TARGETS, ATTENDED = VIEWS = ("merged tokens", "agents or keys", "attended most")
"""What can be drawn of a layer at a step."""

MAX_BYTES = 32 * 2**20
"""Bytes of a recording; where all steps would take more, it has every second, third, … one."""

SIDE = 768
"""Least pixels of the longer side of a drawing."""


class LayerSnapshot(NamedTuple):
    """One layer at one step, for a grid of ``height × width`` tokens, row by row.

    The rest is as in :class:`agentsd.methods.observation.Observation`.
    """

    height: int
    width: int
    owner: Ints | None
    targets: str | None
    places: Ints | None
    target: Ints | None
    attended: Ints | None


class Recording(NamedTuple):
    """An image, and what the layers did while it was made."""

    image: Image.Image
    snapshots: dict[tuple[int, str], LayerSnapshot]
    """By step (from 1) and name of the layer."""

    @property
    def steps(self) -> list[int]:
        """The recorded steps."""
        return sorted({step for step, _ in self.snapshots})

    @property
    def layers(self) -> list[str]:
        """The recorded layers, in the order of the UNet."""
        return list(dict.fromkeys(name for _, name in self.snapshots))


def record_layers(job: Job, pipe: DiffusionPipeline, request: ImageRequest) -> Recording:
    """Make a request's image again and record what each patched layer does.

    Raises:
        JobStopped: If the job is stopped.
        AgentSDError: As :meth:`Job.make`.
    """
    snapshots: dict[tuple[int, str], LayerSnapshot] = {}
    settings = request.settings
    call_kwargs = request.options.call_kwargs(settings.height, settings.width)
    with with_options(pipe, request.options) as pipe, _hooks(pipe, request, snapshots):
        made = job.make(
            pipe, settings, request.schedule, request.scheduler, "recording", call_kwargs
        )
    return Recording(made.image, snapshots)


@contextmanager
def _hooks(
    pipe: DiffusionPipeline,
    request: ImageRequest,
    snapshots: dict[tuple[int, str], LayerSnapshot],
) -> Iterator[None]:
    """Fill ``snapshots`` before the layers' calls."""
    layers = patchable_layers(pipe)
    bytes_a_token = 3 * np.dtype(np.int32).itemsize * len(layers)

    def see(name: str, call: PatchedCall) -> None:
        if call.number % ceil(bytes_a_token * call.x.shape[1] * call.num_steps / MAX_BYTES):
            return
        projections = Projections(call.attn, in_float32=False)
        with torch.no_grad():
            seen = call.step.phase.observe(projections, call.x, call.chosen, call.plan)
        grid = call.grid(pipe, request.settings)
        snapshots[call.number + 1, name] = LayerSnapshot(*grid, *map(_to_numpy, seen))

    with watched(layers, see):
        yield


def _to_numpy(value: Tensor | str | None) -> Any:
    return value.cpu().numpy().astype(np.int32) if isinstance(value, Tensor) else value


def is_empty(snapshot: LayerSnapshot, view: str) -> bool:
    """Whether there is nothing to draw of a layer."""
    if view == MERGED:
        return snapshot.owner is None
    return snapshot.places is None or (snapshot.attended is None and view == ATTENDED)


def first_view(recording: Recording) -> tuple[int, str, str]:
    """The first step, the layer (the last of the UNet) and the view that show something."""
    for step in recording.steps:
        for layer in reversed(recording.layers):
            for view in VIEWS:
                snapshot = recording.snapshots.get((step, layer))
                if snapshot is not None and not is_empty(snapshot, view):
                    return step, layer, view
    return recording.steps[0], recording.layers[-1], VIEWS[0]


def caption(snapshot: LayerSnapshot, view: str) -> str:
    """What a drawing shows, or why there is nothing to draw."""
    if view == MERGED:
        if snapshot.owner is None:
            return "No tokens are merged here."
        count = len(np.unique(snapshot.owner))
        return (
            f"{snapshot.owner.size:,} tokens were merged into {count:,}, each drawn in its mean "
            "colour. White lines separate neighbours that were not merged together; tokens merge "
            "if they are similar, however far apart."
        )
    if snapshot.places is None or snapshot.attended is None:
        return "No agents or keys here: the tokens attend to one another."
    targets, count = snapshot.targets, len(snapshot.places)
    if view == TARGETS:
        return f"{count:,} {targets}. The colours show where in the image each of them is."
    used = len(np.unique(snapshot.attended))
    return (
        f"{used:,} of {count:,} {targets} get the most attention from some token. Each token has "
        "the colour of the one it attends to most, which shows where in the image that one is."
    )


def draw(recording: Recording, snapshot: LayerSnapshot, view: str) -> Image.Image:
    """Draw what a layer did over the image.

    Args:
        recording: Its image.
        snapshot: One of its layers at one of its steps.
        view: One of :data:`VIEWS`.
    """
    image = recording.image
    scale = max(1, ceil(SIDE / max(image.size)))
    size = image.width * scale, image.height * scale
    large = image.resize(size, Image.Resampling.LANCZOS)
    if view == MERGED and snapshot.owner is not None:
        tokens = np.asarray(image.resize((snapshot.width, snapshot.height), Image.Resampling.BOX))
        means = _means(snapshot.owner, tokens.reshape(-1, 3).astype(np.float64))
        drawing = _enlarge(means[snapshot.owner], snapshot, size)
        return _outline(drawing, snapshot.owner, snapshot)
    number = snapshot.target if view == TARGETS else snapshot.attended
    if view == MERGED or number is None or snapshot.places is None:
        return large
    grey = large.convert("L").convert("RGB")
    colours = _colours_by_place(snapshot)[snapshot.places][np.maximum(number, 0)]
    colours[number < 0] = 255
    tint = _enlarge(colours, snapshot, size)
    return _outline(Image.blend(grey, tint, 0.75), number, snapshot)


def _means(numbers: Ints, values: Floats) -> Floats:
    """Mean of the values ``[N, 3]`` of each number in ``numbers`` ``[N]``."""
    sums = [np.bincount(numbers, values[:, c]) for c in range(3)]
    means: Floats = np.stack(sums, axis=1) / np.bincount(numbers)[:, None]
    return means


def _colours_by_place(snapshot: LayerSnapshot) -> Floats:
    """A colour for every token, ``[N, 3]``, blended from those of the four corners."""
    corners = np.array([[[240, 40, 60], [255, 215, 0]], [[40, 60, 255], [0, 220, 130]]], float)
    y, x = np.mgrid[0 : 1 : snapshot.height * 1j, 0 : 1 : snapshot.width * 1j][..., None]
    top = corners[0, 0] * (1 - x) + corners[0, 1] * x
    bottom = corners[1, 0] * (1 - x) + corners[1, 1] * x
    blended: Floats = (top * (1 - y) + bottom * y).reshape(-1, 3)
    return blended


def _enlarge(colours: Floats, snapshot: LayerSnapshot, size: tuple[int, int]) -> Image.Image:
    grid = colours.reshape(snapshot.height, snapshot.width, 3).round().astype(np.uint8)
    return Image.fromarray(grid).resize(size, Image.Resampling.NEAREST)


def _outline(image: Image.Image, numbers: Ints, snapshot: LayerSnapshot) -> Image.Image:
    """Draw lines between tokens of different numbers, unless no other token shares either."""
    grid = numbers.reshape(snapshot.height, snapshot.width)
    count = np.bincount(numbers[numbers >= 0], minlength=int(numbers.max()) + 1)
    alone = (grid < 0) | (count[np.maximum(grid, 0)] == 1)
    draw = ImageDraw.Draw(image)
    wide, high = image.width / snapshot.width, image.height / snapshot.height
    for y, x in np.argwhere((grid[:, 1:] != grid[:, :-1]) & ~(alone[:, 1:] & alone[:, :-1])):
        left = (x + 1) * wide
        draw.line((left, y * high, left, (y + 1) * high), "white")
    for y, x in np.argwhere((grid[1:] != grid[:-1]) & ~(alone[1:] & alone[:-1])):
        top = (y + 1) * high
        draw.line((x * wide, top, (x + 1) * wide, top), "white")
    return image
