"""Agent-CSWin: a CSWin Transformer with agents in its first two stages (arXiv 2107.00652)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ...errors import ModelError
from ...methods.agent_attention import softmax_attention
from ..attention import AgentAttention
from ..bias import Grid
from ..published import BIAS, renamed
from .pyramid import Pyramid, StageSpec
from .registration import create, data_config

__all__ = ["AgentCSWin"]  # timm adds the models

PUBLISHED_NAMES = (
    (r"^stage1_conv_embed\.0\.", "stages.0.proj."),
    (r"^stage1_conv_embed\.2\.", "stages.0.norm."),
    *((rf"^merge{i}\.conv\.", f"stages.{i}.proj.") for i in (1, 2, 3)),
    *((rf"^merge{i}\.norm\.", f"stages.{i}.norm.") for i in (1, 2, 3)),
    *((rf"^stage{i + 1}\.", f"stages.{i}.blocks.") for i in range(4)),
    (r"^(stages\.[01]\.blocks\.\d+)\.attns\.0\.get_v\.", r"\1.attn.dwc."),
    (r"^(stages\.[23]\.blocks\.\d+)\.attns\.(\d)\.get_v\.", r"\1.attn.local.\2."),
    (r"\.attns\.0\.(\w+_bias)$", r".attn.\1"),
    (r"^(stages\.\d\.blocks\.\d+)\.(qkv|proj)\.", r"\1.attn.\2."),
    BIAS,
)


class CrossShapedAttention(nn.Module):
    """Softmax attention in stripes: half of the heads in columns, the others in rows.

    The values' depthwise convolution within a stripe is added, as position encoding.

    Args:
        dim: Width.
        num_heads: Number of heads.
        stripes: Stripes that the image is cut into, each way; with 1, all heads see all of it.
        attn_drop: Dropout of the softmax's weights, in [0, 1).
        proj_drop: Dropout of the output, in [0, 1).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        stripes: int,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        branches = 1 if stripes == 1 else 2
        width = dim // branches
        self.head_dim = dim // num_heads
        self.stripes = stripes
        self.attn_drop = attn_drop
        self.qkv = nn.Linear(dim, 3 * dim)
        self.local = nn.ModuleList(
            nn.Conv2d(width, width, 3, padding=1, groups=width) for _ in range(branches)
        )
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """Attention of tokens ``[B, N, C]`` on a grid whose sides ``stripes`` divides."""
        height, width = grid
        if height % self.stripes or width % self.stripes:
            raise ModelError(
                f"a grid of {height} × {width} tokens cannot be cut into {self.stripes} stripes; "
                f"give an image whose sides are multiples of {16 * self.stripes}"
            )
        columns, rows = (height, width // self.stripes), (height // self.stripes, width)
        qkv = self.qkv(x).unflatten(2, (3, -1)).unflatten(1, grid)  # [B, h, w, 3, C]
        parts = qkv.chunk(len(self.local), dim=-1)
        out = [
            self._attend(part, stripe, convolution)
            for part, stripe, convolution in zip(parts, (columns, rows), self.local, strict=False)
        ]
        attended: Tensor = self.proj_drop(self.proj(torch.cat(out, dim=-1)))
        return attended

    def _attend(self, qkv: Tensor, stripe: Grid, convolution: nn.Module) -> Tensor:
        """Attention of ``[B, h, w, 3, c]`` within stripes, ``[B, N, c]``."""
        batch, height, width = qkv.shape[:3]
        cut = (height // stripe[0], width // stripe[1])
        qkv = qkv.unflatten(2, (cut[1], stripe[1])).unflatten(1, (cut[0], stripe[0]))
        qkv = qkv.permute(5, 0, 1, 3, 2, 4, 6).flatten(1, 3).flatten(2, 3)  # [3, S, n, c]
        q, k, v = qkv.unflatten(3, (-1, self.head_dim)).transpose(2, 3)  # [S, H, n, d]
        drop = self.attn_drop if self.training else 0.0
        out = softmax_attention(q, k, v, self.head_dim**-0.5, None, drop)  # [S, H, n, d]
        local = convolution(qkv[2].mT.unflatten(2, stripe)).flatten(2).mT  # [S, n, c]
        out = out.transpose(1, 2).flatten(2) + local
        out = torch.unflatten(out.unflatten(0, (batch, *cut)), 3, stripe)  # [B, ·, ·, h', w', c]
        return out.transpose(2, 3).flatten(1, 4)


class AgentCSWin(Pyramid):
    """A CSWin Transformer with agents over the whole image in its first two stages.

    Args:
        depths: Blocks of each stage.
        embed_dim: Width of the first stage; each stage doubles it.
        num_heads: Heads of each stage.
        agents: Number of agents in each of the first two stages, square numbers.
        attn_drop_rate: Dropout of the softmaxes' weights.
        options: Those of :class:`~agentsd.nn.pyramid.Pyramid`, such as ``img_size``.
    """

    def __init__(
        self,
        depths: Sequence[int],
        embed_dim: int = 64,
        num_heads: Sequence[int] = (2, 4, 8, 16),
        agents: Sequence[int] = (9, 16),
        attn_drop_rate: float = 0.0,
        **options: Any,
    ) -> None:
        shared = {"attn_drop": attn_drop_rate, "proj_drop": options.get("proj_drop_rate", 0.0)}
        stages = []
        for index, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
            width = embed_dim * 2**index
            attention: Callable[[Grid], nn.Module]
            if index < 2:
                attention = partial(AgentAttention, width, heads, agents=agents[index], **shared)
            else:
                attention = partial(_striped, width, heads, 4 - index, **shared)
            reduction = (3, 2, 1) if index else (7, 4, 2)
            stages.append(StageSpec(depth, width, heads, 4, reduction, attention))
        super().__init__(stages, position=False, final_norm=True, norm_eps=1e-5, **options)

    def rename_published(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename published weights for this model."""
        return renamed(weights, PUBLISHED_NAMES)


def _striped(width: int, heads: int, stripes: int, _: Grid, **options: Any) -> nn.Module:
    return CrossShapedAttention(width, heads, stripes, **options)


default_cfgs = generate_default_cfgs(
    {f"agent_cswin_{size}": data_config("stages.0.proj") for size in ("tiny", "small", "base")}
)


@register_model  # type: ignore[untyped-decorator]
def agent_cswin_tiny(pretrained: bool = False, **options: Any) -> AgentCSWin:
    """Agent-CSWin-T, 20.5 million parameters."""
    return create(AgentCSWin, "agent_cswin_tiny", pretrained, **{"depths": (2, 4, 18, 1)} | options)


@register_model  # type: ignore[untyped-decorator]
def agent_cswin_small(pretrained: bool = False, **options: Any) -> AgentCSWin:
    """Agent-CSWin-S, 32.8 million parameters."""
    return create(
        AgentCSWin, "agent_cswin_small", pretrained, **{"depths": (3, 6, 29, 2)} | options
    )


@register_model  # type: ignore[untyped-decorator]
def agent_cswin_base(pretrained: bool = False, **options: Any) -> AgentCSWin:
    """Agent-CSWin-B, 73.2 million parameters."""
    own: dict[str, Any] = {"depths": (3, 6, 29, 2), "embed_dim": 96, "num_heads": (4, 8, 16, 32)}
    return create(AgentCSWin, "agent_cswin_base", pretrained, **own | options)
