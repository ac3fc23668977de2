"""What the patch sees: merged regions, agents, and whom each place of an image listens to."""

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

from ..methods.merge import Merge
from ..methods.token_merging import merge
from ..patching.layers import find_attention_layers, find_unet
from ..patching.processor import LAYER, PatchedLayer, Projections
from ..patching.runtime import Step
from .limits import Request
from .worker import Job

Ints = NDArray[np.int32]
VIEWS = ("merged regions", "agents", "listens to")
"""What can be drawn of a layer at a step."""

MOST_BYTES = 32 * 2**20
"""Of a recording; where all steps would take more, some are left out, evenly."""

SIDE = 768
"""Pixels of the longer side of what is drawn, at least."""

ROWS = 2048
"""Queries compared with all agents or keys at a time, so that memory stays bounded."""


class Seen(NamedTuple):
    """One layer at one step, for a grid of ``height × width`` tokens, row by row."""

    method: str
    height: int
    width: int
    owner: Ints | None
    """``[N]`` merged token that each token belongs to; ``None`` where none merge."""
    agents: Ints | None
    """``[N]`` agent that each token belongs to, or (``keys``) the key that it is, else -1;
    ``None`` where there are neither."""
    listens: Ints | None
    """``[N]`` agent, or key of the first head, that each token listens to most."""
    places: Ints | None
    """``[n]`` token at whose place each agent, or key, is."""


class Recording(NamedTuple):
    """An image, and what was seen while it was made."""

    image: Image.Image
    seen: dict[tuple[int, str], Seen]
    """By step (from 1) and name of the layer."""

    @property
    def steps(self) -> list[int]:
        """The steps that are there."""
        return sorted({step for step, _ in self.seen})

    @property
    def layers(self) -> list[str]:
        """The layers that are there, in the order of the UNet."""
        return list(dict.fromkeys(name for _, name in self.seen))


def look(job: Job, pipe: DiffusionPipeline, request: Request) -> Recording:
    """Make a request's image again and note what each patched layer does.

    Raises:
        Stopped: If the job is stopped.
        AgentSDError: As :meth:`Job.make`.
    """
    seen: dict[tuple[int, str], Seen] = {}
    with _watched(pipe, request, seen):
        made = job.make(pipe, request.settings, request.schedule, request.scheduler, "looking")
    return Recording(made.image, seen)


@contextmanager
def _watched(
    pipe: DiffusionPipeline, request: Request, seen: dict[tuple[int, str], Seen]
) -> Iterator[None]:
    layers = [
        layer
        for layer in find_attention_layers(find_unet(pipe))
        if layer.unpatchable_reason is None
    ]
    rows, columns = (
        (side or 0) // pipe.vae_scale_factor
        for side in (request.settings.height, request.settings.width)
    )
    bytes_a_token = 3 * np.dtype(np.int32).itemsize * len(layers)

    def watch(name: str) -> Any:
        def note(attn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            layer: PatchedLayer | None = vars(attn).get(LAYER)
            step = layer.step_for(x.shape[1]) if layer is not None else None
            if layer is None or step is None:
                return
            number, steps = step.position.step, step.position.num_steps
            if number % ceil(bytes_a_token * x.shape[1] * steps / MOST_BYTES) == 0:
                grid = -(-rows // layer.downsample), -(-columns // layer.downsample)
                with torch.no_grad():
                    seen[number + 1, name] = _see(attn, x, step, layer, *grid)

        return note

    hooks = [
        layer.module.register_forward_pre_hook(watch(layer.name), with_kwargs=True)
        for layer in layers
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _see(attn: Any, x: Tensor, step: Step, layer: PatchedLayer, height: int, width: int) -> Seen:
    """What the layer is about to do, for the last image of the batch: the guided one."""
    method, plan = step.phase.method, step.plans[layer.downsample]
    projections = Projections(attn, in_float32=False)
    if not isinstance(step.phase, Merge):
        chosen = step.chosen[layer.downsample, attn.heads][0]  # [n], of the first head
        q = projections.queries(x[-1:])[:, 0]  # [1, N, d]
        k = projections.keys_and_values(x[-1:, chosen])[0][:, 0]  # [1, n, d]
        is_key = np.full(plan.tokens, -1, np.int32)
        is_key[chosen.cpu().numpy()] = np.arange(len(chosen), dtype=np.int32)
        listens = _favourites(q[None], k[None], q.shape[-1] ** -0.5)
        return Seen(method, height, width, None, is_key, listens, _ints(chosen))
    owner, agent_owner = step.phase.match(x, step.chosen[layer.downsample, attn.heads], plan)
    owned = _ints(owner[-1])
    if agent_owner is None:
        return Seen(method, height, width, owned, None, None, None)
    merged = merge(x, owner, plan.merged_tokens)
    agents = merge(x, agent_owner, plan.agents)
    q, a = (projections.queries(tokens[-1:]) for tokens in (merged, agents))
    scale = (q.shape[-1] ** -0.5) ** getattr(step.phase, "k_scale2", 1)
    best = _favourites(q, a, scale)
    whose = _ints(agent_owner[-1])
    places = np.unique(whose, return_index=True)[1].astype(np.int32)
    destinations = _ints(step.chosen[layer.downsample, attn.heads])
    places[: len(destinations)] = (
        destinations  # the first are the destinations; others are themselves
    )
    return Seen(method, height, width, owned, whose, best[owned], places)


def _favourites(q: Tensor, k: Tensor, scale: float) -> Ints:
    """Which of ``k`` ``[1, H, n, d]`` each of ``q`` ``[1, H, N, d]`` listens to most, in all."""
    found = [
        (rows.float() @ k.float().mT * scale).softmax(dim=-1).mean(dim=1).argmax(dim=-1)[0]
        for rows in q.split(ROWS, dim=2)
    ]
    return _ints(torch.cat(found))


def _ints(x: Tensor) -> Ints:
    return x.cpu().numpy().astype(np.int32)


def told(seen: Seen, view: str) -> str:
    """What a picture of it shows, or why there is none."""
    if seen.method == "full":
        return "This step leaves the layer as it is."
    if view == "merged regions":
        if seen.owner is None:
            return "Nothing is merged here: every place asks, and a few answer."
        count = len(np.unique(seen.owner))
        return (
            f"{seen.owner.size:,} tokens became {count:,}, each in its mean colour. Lines part "
            "neighbours that are not one token; likeness merges, however far apart."
        )
    if seen.agents is None or seen.listens is None:
        return "No agents here: the merged tokens attend to each other."
    what = "keys of the first head" if seen.method == "keys" else "agents"
    count = len(np.unique(seen.agents[seen.agents >= 0]))
    if view == "agents":
        return f"{count:,} {what}; the colours tell where in the image each one is."
    used = len(np.unique(seen.listens))
    return (
        "Each place has the colour of the one it listens to most, which tells where that one is. "
        f"{used:,} of {count:,} {what} are somebody's favourite."
    )


def overlay(recording: Recording, seen: Seen, view: str) -> Image.Image:
    """What was seen, laid over the image.

    Args:
        recording: What it is of.
        seen: One of its layers at one of its steps.
        view: One of :data:`VIEWS`.
    """
    image = recording.image
    scale = max(1, ceil(SIDE / max(image.size)))
    size = image.width * scale, image.height * scale
    large = image.resize(size, Image.Resampling.LANCZOS)
    if view == "merged regions" and seen.owner is not None:
        tokens = np.asarray(image.resize((seen.width, seen.height), Image.Resampling.BOX))
        mean = _means(seen.owner, tokens.reshape(-1, 3).astype(np.float64))
        shown = _stretched(mean[seen.owner], seen, size)
        return _lined(shown, seen.owner, seen)
    if view == "merged regions" or seen.agents is None or seen.listens is None:
        return large
    place = _colours(seen)[seen.places]
    of = seen.agents if view == "agents" else seen.listens
    grey = large.convert("L").convert("RGB")
    colours = place[np.maximum(of, 0)]
    colours[of < 0] = 255
    tint = _stretched(colours, seen, size)
    return _lined(Image.blend(grey, tint, 0.75), of, seen)


def _means(of: Ints, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean of the values ``[N, 3]`` of each number in ``of`` ``[N]``."""
    sums = [np.bincount(of, values[:, c]) for c in range(3)]
    means: NDArray[np.float64] = np.stack(sums, axis=1) / np.bincount(of)[:, None]
    return means


def _colours(seen: Seen) -> NDArray[np.float64]:
    """A colour ``[N, 3]`` for every place: four corners, and what lies between."""
    corners = np.array([[[240, 40, 60], [255, 215, 0]], [[40, 60, 255], [0, 220, 130]]], float)
    y, x = np.mgrid[0 : 1 : seen.height * 1j, 0 : 1 : seen.width * 1j][..., None]
    top = corners[0, 0] * (1 - x) + corners[0, 1] * x
    low = corners[1, 0] * (1 - x) + corners[1, 1] * x
    mixed: NDArray[np.float64] = (top * (1 - y) + low * y).reshape(-1, 3)
    return mixed


def _stretched(colours: NDArray[np.float64], seen: Seen, size: tuple[int, int]) -> Image.Image:
    grid = colours.reshape(seen.height, seen.width, 3).round().astype(np.uint8)
    return Image.fromarray(grid).resize(size, Image.Resampling.NEAREST)


def _lined(image: Image.Image, of: Ints, seen: Seen) -> Image.Image:
    """The image with lines between places of different numbers, but for those alone."""
    grid = of.reshape(seen.height, seen.width)
    count = np.bincount(of[of >= 0], minlength=int(of.max()) + 1)
    lone = (grid < 0) | (count[np.maximum(grid, 0)] == 1)
    draw = ImageDraw.Draw(image)
    wide, high = image.width / seen.width, image.height / seen.height
    for y, x in np.argwhere((grid[:, 1:] != grid[:, :-1]) & ~(lone[:, 1:] & lone[:, :-1])):
        left = (x + 1) * wide
        draw.line((left, y * high, left, (y + 1) * high), "white")
    for y, x in np.argwhere((grid[1:] != grid[:-1]) & ~(lone[1:] & lone[:-1])):
        top = (y + 1) * high
        draw.line((x * wide, top, (x + 1) * wide, top), "white")
    return image
