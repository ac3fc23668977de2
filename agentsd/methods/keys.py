"""``keys``: every query attends to one token per cell."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from .base import BasePhase, Count, Draw, Plan, SelfAttention, Stride
from .observation import Observation, attended_most
from .token_grid import cells, cycled_places, random_places, strides_for, tokens_at

KEYS = "Maximum number of keys at any image size. Fewer: faster, coarser."
SELECT = "Which token of a cell is its key. cycle: each in turn, closest to full attention."


class Keys(BasePhase):
    """Every query attends to one token of each ``sy × sx`` cell.

    With ``cycle``, each head uses every token of a cell as a key once in ``sx · sy`` steps, so that
    the errors of neighbouring steps and of different heads cancel.

    Args:
        sx, sy: Width and height of a cell, in tokens, 1 to 64. Larger cells mean fewer keys.
        keys: Maximum number of keys at any resolution, 1 to 65,536; cells grow beyond
            ``sx`` × ``sy`` to stay within it.
        select: Which token of a cell is its key: the top-left one (``grid``), one drawn at each
            step (``random``), or each in turn (``cycle``, the closest to full attention).
        attn_precision: ``"fp32"`` computes the softmax in float32 (for Stable Diffusion 2.1 in
            float16); ``None`` keeps the model's precision.
        until, until_step, max_downsample, min_tokens, cache: As for :class:`Full`.

    Raises:
        ScheduleError: As for :class:`Full`.

    Example:
        >>> Keys(sx=4, sy=4).plan(64, 64)
        Plan(tokens=4096, merged_tokens=4096, agents=0, keys=256)
    """

    summary: ClassVar = "every query attends to a few of the keys"

    method: Literal["keys"] = "keys"
    sx: Annotated[
        Stride, Field(description="Width of a cell. Larger: fewer keys, faster, coarser.")
    ] = 2
    sy: Annotated[
        Stride, Field(description="Height of a cell. Larger: fewer keys, faster, coarser.")
    ] = 2
    keys: Annotated[Count | None, Field(description=KEYS, examples=[64, 256, 1024])] = None
    select: Annotated[Literal["grid", "random", "cycle"], Field(description=SELECT)] = "cycle"
    attn_precision: Literal["fp32"] | None = None

    def strides(self, height: int, width: int) -> tuple[int, int]:
        """Height and width ``(sy, sx)`` of the cells on a grid of ``height × width`` tokens."""
        if self.keys is None:
            return self.sy, self.sx
        sy, sx = strides_for(height, width, self.keys, partial=True)
        return max(sy, self.sy), max(sx, self.sx)

    def plan(self, height: int, width: int) -> Plan:
        """Count the keys of a grid."""
        tokens = height * width
        rows, columns = cells(height, width, *self.strides(height, width), partial=True)
        return Plan(tokens, tokens, 0, rows * columns)

    def period(self, height: int, width: int) -> int | None:
        """The number of steps after which the same tokens are chosen again; None if never."""
        sy, sx = self.strides(height, width)
        return {"grid": 1, "cycle": sy * sx, "random": None}[self.select]

    def choose(self, draw: Draw, heads: int, height: int, width: int) -> Tensor:
        """The keys ``[heads, cells]`` of each head."""
        sy, sx = self.strides(height, width)
        rows, columns = cells(height, width, sy, sx, partial=True)
        shape = heads, rows * columns
        if self.select == "grid":
            place = torch.zeros(shape, dtype=torch.int64, device=draw.device)
        else:
            # A cycle needs consecutive step numbers, which a noise level does not give.
            cycle = self.select == "cycle" and draw.steps_known
            places = cycled_places if cycle else random_places
            place = places(shape, sy * sx, draw.step, draw.seed, draw.device)
        return tokens_at(place, height, width, sy, sx, rows)

    def attention(
        self, layer: SelfAttention, x: Tensor, chosen: Tensor, plan: Plan
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from every query to the chosen tokens of each head."""
        k, v = layer.some_keys_and_values(x, chosen)
        q = layer.queries(x)
        return layer.output(layer.attend(q, k, v, q.shape[-1] ** -0.5)), None

    def observe(self, layer: SelfAttention, x: Tensor, chosen: Tensor, plan: Plan) -> Observation:
        """Observe the keys of the first head, and the one that each token attends to most."""
        places = chosen[0]  # [n]
        q = layer.queries(x[-1:])[0, :1]  # [1, N, d]
        k = layer.keys_and_values(x[-1:, places])[0][0, :1]  # [1, n, d]
        target = places.new_full((plan.tokens,), -1)
        target[places] = torch.arange(len(places), device=places.device)
        attended = attended_most(q, k, q.shape[-1] ** -0.5)
        return Observation(None, "keys of the first head", places, target, attended)

    def stages(self, plan: Plan) -> tuple[str, ...]:
        """Short descriptions of the tokens left after each stage of a plan."""
        return (f"{plan.keys:,} keys",)
