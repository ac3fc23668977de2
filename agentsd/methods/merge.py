"""``merge``: softmax attention over merged tokens (Bolya & Hoffman 2023, arXiv 2303.17604)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from .base import BasePhase, Draw, Plan, SelfAttention, Share, Stride
from .observation import Observation
from .token_grid import cells, random_places, tokens_at
from .token_merging import match, merge, owners, unmerge

RATIO = "Share of tokens to merge. Higher: faster, coarser."
WIDTH = "Width of a cell. Larger: faster, coarser."
HEIGHT = "Height of a cell. Larger: faster, coarser."


class Merging(BasePhase):
    """The parameters of methods that merge tokens, and the choice of destinations.

    :class:`Merge` documents the parameters.
    """

    ratio: Annotated[Share, Field(description=RATIO, examples=[0.2, 0.4, 0.6])] = 0.5
    sx: Annotated[Stride, Field(description=WIDTH)] = 2
    sy: Annotated[Stride, Field(description=HEIGHT)] = 2
    use_rand: bool = True
    merge_crossattn: bool = False
    merge_mlp: bool = False
    attn_precision: Literal["fp32"] | None = None

    def strides(self, height: int, width: int) -> tuple[int, int]:
        """Height and width ``(sy, sx)`` of the cells on a grid of ``height × width`` tokens."""
        return self.sy, self.sx

    def merged_plan(self, height: int, width: int) -> tuple[Plan, int]:
        """The plan without agents, and the number of destinations."""
        tokens = height * width
        rows, columns = cells(height, width, *self.strides(height, width), partial=False)
        if not rows * columns:
            return Plan(tokens, tokens, 0, tokens), 0
        merged = tokens - min(tokens - rows * columns, int(tokens * self.ratio))
        return Plan(tokens, merged, 0, merged), rows * columns

    def period(self, height: int, width: int) -> int | None:
        """The number of steps after which the same tokens are chosen again; None if never."""
        return None if self.use_rand else 1

    def choose(self, draw: Draw, heads: int, height: int, width: int) -> Tensor:
        """The destinations ``[cells]``, the same for all heads."""
        sy, sx = self.strides(height, width)
        rows, columns = cells(height, width, sy, sx, partial=False)
        shape = (rows * columns,)
        if self.use_rand:
            place = random_places(shape, sy * sx, draw.step, draw.seed, draw.device)
        else:
            place = torch.zeros(shape, dtype=torch.int64, device=draw.device)
        return tokens_at(place, height, width, sy, sx, rows)

    def stages(self, plan: Plan) -> tuple[str, ...]:
        """Short descriptions of the tokens left after each stage of a plan."""
        return (f"{plan.merged_tokens:,}",)

    def caps(self, plan: Plan) -> list[str]:
        """Explain where a plan differs from the requested parameters."""
        return capped("ratio", self.ratio, plan.tokens - plan.merged_tokens, plan.tokens)


class Merge(Merging):
    """Merge similar tokens, attend, and give each token the output of the one it was merged into.

    Args:
        ratio: Share of the tokens to merge, in [0, 1]. It is capped (at 0.9375 for stride 4), since
            destinations are never merged. Higher is faster and coarser.
        sx, sy: Width and height of a cell, in tokens, 1 to 64. Each cell has one destination.
        use_rand: Draw each cell's destination at random instead of using its top-left token.
        merge_crossattn: Also merge the queries of the cross-attention. Not recommended: it saves
            little time and loses detail.
        merge_mlp: Also merge the tokens of the feed-forward network. Not recommended either.
        attn_precision: ``"fp32"`` computes the softmaxes in float32 (for Stable Diffusion 2.1 in
            float16); ``None`` keeps the model's precision.
        until, until_step, max_downsample, min_tokens, cache: As for :class:`Full`.

    Raises:
        ScheduleError: As for :class:`Full`.

    Example:
        >>> Merge(ratio=0.4).plan(64, 64)
        Plan(tokens=4096, merged_tokens=2458, agents=0, keys=2458)
    """

    summary: ClassVar = "similar tokens are merged into one"

    method: Literal["merge"] = "merge"

    def plan(self, height: int, width: int) -> Plan:
        """Count the tokens left after merging."""
        return self.merged_plan(height, width)[0]

    def attention(
        self, layer: SelfAttention, x: Tensor, chosen: Tensor, plan: Plan
    ) -> tuple[Tensor, Tensor | None]:
        """Merge into the chosen tokens, attend, unmerge."""
        return merged_attention(layer, x, owners_of(x, chosen, plan), plan, softmax_attention)

    def observe(self, layer: SelfAttention, x: Tensor, chosen: Tensor, plan: Plan) -> Observation:
        """Observe which tokens are merged."""
        return Observation(owners_of(x[-1:], chosen, plan)[0, 0])


def owners_of(x: Tensor, chosen: Tensor, plan: Plan) -> Tensor:
    """Each token's merged row ``[1, B, N]``, or its merged row and its agent ``[2, B, N]``."""
    levels = (plan.merged_tokens, plan.agents) if plan.agents else (plan.merged_tokens,)
    return owners(match(x, chosen), *(plan.tokens - count for count in levels))


def merged_attention(
    layer: SelfAttention,
    x: Tensor,
    owner: Tensor,
    plan: Plan,
    attend: Callable[[SelfAttention, Tensor, Tensor, Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Merge tokens, attend among the merged ones, unmerge.

    Args:
        layer: The layer.
        x: The tokens, ``[B, N, C]``.
        owner: Their owners, from :func:`owners_of`.
        plan: The layer's plan.
        attend: Attention function, called with the layer, queries, keys and values
            ``[B, H, M, d]``, and agents ``[B, H, n, d]``.

    Returns:
        The output ``[B, N, C]``, and each token's owner ``[B, N]``.
    """
    batch, count = len(x), len(x) * plan.merged_tokens
    table = merge(x, owner, count + batch * plan.agents)  # [B·M + B·n, C]
    k, v = layer.keys_and_values(table[:count].unflatten(0, (batch, -1)))
    rows = layer.queries(table[None])[0]  # [H, B·M + B·n, d]; one projection for both
    q, agents = (_split_images(part, batch) for part in (rows[:, :count], rows[:, count:]))
    return unmerge(layer.output(attend(layer, q, k, v, agents)), owner[0]), owner[0]


def softmax_attention(layer: SelfAttention, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    """All merged tokens attend to each other."""
    return layer.attend(q, k, v, q.shape[-1] ** -0.5)


def _split_images(rows: Tensor, batch: int) -> Tensor:
    """``[H, B·n, d]`` to ``[B, H, n, d]``."""
    heads, count, width = rows.shape
    return rows.view(heads, batch, count // batch, width).transpose(0, 1)


def capped(name: str, ratio: float, merged: int, tokens: int) -> list[str]:
    """A note if fewer tokens are merged than a ratio asks for."""
    if merged >= int(tokens * ratio):
        return []
    return [f"{name} {ratio:g} is capped to {merged / tokens:.4g}: one token of each cell is kept"]
