"""What one place of an image listens to: the keys or agents it attends to, drawn on the image."""

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

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]

MOST_STEPS = 6
"""Recorded steps of a run, evenly spread."""

MAX_BYTES = 24 * 2**20
"""Bytes of a recording; with larger images it has fewer steps."""

SIDE = 640
"""Least pixels of the longer side of a drawing."""


class Explained(NamedTuple):
    """An image, and what its places listened to while it was made."""

    image: Image.Image
    maps: list[AttentionMap]
    """In the order of the steps; empty if the schedule leaves the layer as it was."""


class AttentionMap(NamedTuple):
    """One layer at one step, for a grid of ``height × width`` tokens and ``H`` heads."""

    step: int
    """From 1."""
    height: int
    width: int
    queries: Tensor
    """``[H, n, d]``; the query of token ``i`` is in row ``query_of[i]``."""
    query_of: Ints
    """``[N]``."""
    keys: Tensor
    """``[H, m, d]``."""
    scale: float
    """Of the softmax."""
    places: Ints
    """Where the keys are: ``[H, m]`` tokens, or ``[m]`` for all heads."""
    targets: str
    """What the keys are called, in the plural."""

    def weights(self, token: int) -> Floats:
        """The attention of a token to every token, averaged over the heads; ``[N]``, sum 1."""
        row = int(self.query_of[token])
        scores = torch.einsum("hd,hmd->hm", self.queries[:, row].float(), self.keys.float())
        weights = (scores * self.scale).softmax(dim=-1).numpy()  # [H, m]
        total = np.zeros(self.height * self.width, np.float32)
        places = np.broadcast_to(self.places, weights.shape)
        np.add.at(total, places.ravel(), weights.ravel() / len(weights))
        return total

    def token_at(self, x: float, y: float) -> int:
        """The token at a place of the image, given as shares of its width and height."""
        column = min(self.width - 1, max(0, int(x * self.width)))
        return min(self.height - 1, max(0, int(y * self.height))) * self.width + column


def explain(job: Job, pipe: DiffusionPipeline, request: ImageRequest) -> Explained:
    """Make a request's image again and record what its places listen to.

    Raises:
        JobStopped: If the job is stopped.
        AgentSDError: As :meth:`Job.make`.
    """
    settings = request.settings
    call_kwargs = request.options.call_kwargs(settings.height, settings.width)
    with with_options(pipe, request.options) as pipe, recorded(pipe, request) as maps:
        made = job.make(
            pipe, settings, request.schedule, request.scheduler, "recording", call_kwargs
        )
    return Explained(made.image, maps)


@contextmanager
def recorded(pipe: DiffusionPipeline, request: ImageRequest) -> Iterator[list[AttentionMap]]:
    """Record while the block runs: the last patched layer of the highest resolution."""
    maps: list[AttentionMap] = []
    layers = patchable_layers(pipe)
    top = min(layer.downsample for layer in layers)

    def see(_: str, call: PatchedCall) -> None:
        size = 2 * torch.half.itemsize * call.x[-1:].numel()  # queries, and at most as many keys
        wanted = max(1, min(MOST_STEPS, MAX_BYTES // size))
        is_known = any(each.step == call.number + 1 for each in maps)
        if call.number % ceil(call.num_steps / wanted) == 0 and not is_known:
            maps.append(_map_of(call, call.grid(pipe, request.settings)))

    with watched([layer for layer in layers if layer.downsample == top][-1:], see):
        yield maps


def _map_of(call: PatchedCall, grid: tuple[int, int]) -> AttentionMap:
    phase, x, chosen, plan = call.step.phase, call.x, call.chosen, call.plan
    projections = _Listening(call.attn, in_float32=False)
    with torch.no_grad():
        phase.attention(projections, x[-1:], chosen, plan)
        seen = phase.observe(Projections(call.attn, in_float32=False), x, chosen, plan)
    queries, keys, scale = projections.heard
    tokens = np.arange(x.shape[1])
    owner = tokens if seen.owner is None else seen.owner.cpu().numpy()
    if plan.agents and seen.places is not None:
        places: Any = seen.places.cpu().numpy()
    elif seen.owner is not None:
        places = _representatives(owner)
    else:
        places = chosen.cpu().numpy()  # [H, m] for keys
    targets = seen.targets or "tokens"
    return AttentionMap(call.number + 1, *grid, queries, owner, keys, scale, places, targets)


class _Listening(Projections):
    """Projections that remember the last attention to pass through them: that of the image."""

    heard: tuple[Tensor, Tensor, float]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        self.heard = q[-1].cpu().half(), k[-1].cpu().half(), scale
        return super().attend(q, k, v, scale)


def _representatives(owner: Ints) -> Ints:
    """The first token of each merged one."""
    _, first = np.unique(owner, return_index=True)
    return first


def drawing_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of the drawing of an image, in pixels."""
    scale = max(1.0, SIDE / max(image.size))
    return round(image.width * scale), round(image.height * scale)


def draw(image: Image.Image, seen: AttentionMap, token: int) -> Image.Image:
    """Draw on an image what a token listens to: brighter and larger, the more it does."""
    size = drawing_size(image)
    weights = seen.weights(token)
    top = float(np.sort(weights)[-max(1, len(weights) // 200) :].mean()) or 1.0
    shares = np.minimum(weights / top, 1.0)
    base = image.resize(size, Image.Resampling.LANCZOS).convert("RGB")
    grey = Image.blend(base, base.convert("L").convert("RGB"), 0.65)
    canvas = Image.blend(grey, Image.new("RGB", size, "#0b1020"), 0.45)
    overlay = Image.new("RGBA", size, (0, 0, 0, 0))
    pen = ImageDraw.Draw(overlay)
    wide, high = size[0] / seen.width, size[1] / seen.height
    for place in np.argsort(shares):
        share = float(shares[place])
        if share < 0.02:
            continue
        x, y = (place % seen.width + 0.5) * wide, (place // seen.width + 0.5) * high
        radius = max(1.5, (0.35 + 0.55 * share) * max(wide, high))
        colour = _heat(share)
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    canvas = Image.alpha_composite(canvas.convert("RGBA"), overlay).convert("RGB")
    pen = ImageDraw.Draw(canvas)
    x, y = (token % seen.width + 0.5) * wide, (token // seen.width + 0.5) * high
    for radius, ink in ((15, "#0b1020"), (13, "white"), (10, "#0b1020")):
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), outline=ink, width=3)
    return canvas


def _heat(share: float) -> tuple[int, int, int, int]:
    """From a faint violet over orange to pale yellow."""
    stops = ((76, 29, 149), (219, 39, 119), (251, 146, 60), (254, 249, 195))
    at = min(share, 0.999) * (len(stops) - 1)
    low, part = int(at), at - int(at)
    red, green, blue = (
        round(a + (b - a) * part) for a, b in zip(stops[low], stops[low + 1], strict=True)
    )
    return red, green, blue, round(70 + 185 * share)


def caption(seen: AttentionMap, token: int) -> str:
    """What a drawing shows."""
    weights = seen.weights(token)
    count = int((weights > 0).sum())
    descending = np.sort(weights)[::-1].cumsum()
    half = int((descending < 0.5).sum()) + 1
    return (
        f"Step {seen.step}: the ring attends to {count:,} of {len(weights):,} places "
        f"({'keys of all heads' if seen.places.ndim == 2 else seen.targets}); "
        f"the {half:,} brightest get half of its attention. Click another place."
    )
