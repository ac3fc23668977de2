"""``keys``: every query, over one token of each cell as key and value."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from .base import Count, Draw, Phase, Plan, SelfAttention, Stride
from .token_grid import cells, cycled_places, random_places, strides_for, tokens_at

BOUND = "At most so many at any size. Fewer: faster, coarser."


class Keys(Phase):
    """Every query, but one token of each ``sy × sx`` cell as key and value.

    In turn (``cycle``), each token of a cell serves once as a key of each head within
    ``sx · sy`` steps, so that the errors of neighbouring steps and of different heads cancel.

    Args:
        sx, sy: Width and height of a cell, in tokens, 1 to 64. Larger cells mean fewer keys.
        keys: At most so many keys, at any resolution: where there would be more, cells are larger
            than ``sx`` × ``sy``.
        select: Key of a cell: its top-left token (``grid``), one drawn at each step (``random``),
            or each in turn (``cycle``, the closest to full attention).
        attn_precision: ``"fp32"`` computes the softmax in float32 (for Stable Diffusion 2.1 in
            float16); ``None`` leaves the model's precision.
    """

    summary: ClassVar = "every query, a few of the keys"

    method: Literal["keys"] = "keys"
    sx: Annotated[Stride, Field(description="Width of a cell. Larger: fewer keys; faster.")] = 2
    sy: Annotated[Stride, Field(description="Height of a cell, likewise.")] = 2
    keys: Annotated[Count | None, Field(description=BOUND)] = None
    select: Annotated[
        Literal["grid", "random", "cycle"],
        Field(description="Which token of a cell is its key. cycle: each in turn, the closest."),
    ] = "cycle"
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

    def choose(self, draw: Draw, heads: int, height: int, width: int) -> Tensor:
        """The keys ``[heads, cells]`` of each head."""
        sy, sx = self.strides(height, width)
        rows, columns = cells(height, width, sy, sx, partial=True)
        shape = heads, rows * columns
        if self.select == "grid":
            place = torch.zeros(shape, dtype=torch.int64, device=draw.device)
        else:
            # A cycle needs steps that follow each other; a level of noise does not tell them.
            cycle = self.select == "cycle" and draw.steps_known
            places = cycled_places if cycle else random_places
            place = places(shape, sy * sx, draw.step, draw.seed, draw.device)
        return tokens_at(place, height, width, sy, sx, rows)

    def attention(
        self, layer: SelfAttention, x: Tensor, chosen: Tensor, plan: Plan
    ) -> tuple[Tensor, Tensor | None]:
        """Every query over the chosen tokens of each head."""
        k, v = layer.some_keys_and_values(x, chosen)
        q = layer.queries(x)
        return layer.output(layer.attend(q, k, v, q.shape[-1] ** -0.5)), None

    def stages(self, plan: Plan) -> tuple[str, ...]:
        """What the tokens of a plan become, in a few words."""
        return (f"{plan.keys:,} keys",)
