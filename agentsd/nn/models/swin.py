"""Agent-Swin: timm's Swin Transformer, with agents over the whole image in its first blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.layers import to_2tuple
from timm.models import generate_default_cfgs, register_model
from timm.models.swin_transformer import (
    SwinTransformer,
    SwinTransformerBlock,
    checkpoint_filter_fn,
)
from torch import Tensor

from ..attention import AgentAttention
from ..bias import Grid
from ..published import BIAS, renamed
from .registration import create, data_config

__all__ = ["AgentSwin"]  # timm adds the models


class AgentSwinBlock(SwinTransformerBlock):  # type: ignore[misc]  # timm is untyped
    """timm's block, with agents over the whole image in place of windows."""

    def __init__(self, dim: int, grid: Grid, num_heads: int, agents: int, **options: Any) -> None:
        # The window is not used; a large one would cost memory until its attention is replaced.
        super().__init__(dim, grid, num_heads, window_size=1, **options)
        self.attn = AgentAttention(
            dim,
            num_heads,
            grid,
            agents,
            attn_drop=options["attn_drop"],
            proj_drop=options["proj_drop"],
        )

    def _attn(self, x: Tensor) -> Tensor:
        """Attention of ``[B, h, w, C]``, called by timm's block between norm and residual."""
        out: Tensor = self.attn(x.flatten(1, 2), (x.shape[1], x.shape[2]))
        return out.view_as(x)

    def set_input_size(self, feat_size: Grid, *_: Any, **__: Any) -> None:
        """Resize the biases; there are no windows."""
        self.input_resolution = feat_size
        self.attn.set_grid(feat_size)


class AgentSwin(SwinTransformer):  # type: ignore[misc]  # timm is untyped
    """A Swin Transformer some of whose blocks attend through agents.

    Args:
        agents: Number of agents in each stage, square numbers.
        agent_blocks: How many blocks of each stage have them, from its first.
        options: Those of timm's ``SwinTransformer``, such as ``img_size``. The sides of windows
            are a thirty-second of the image's by default, and at least 7, as published.
    """

    def __init__(
        self,
        agents: Sequence[int] = (9, 16, 49, 49),
        agent_blocks: Sequence[int] = (2, 2, 0, 0),
        **options: Any,
    ) -> None:
        height, width = to_2tuple(options.get("img_size", 224))
        windows = {"window_size": (max(7, height // 32), max(7, width // 32))}
        super().__init__(**windows | options)
        shared = {
            "attn_drop": options.get("attn_drop_rate", 0.0),
            "proj_drop": options.get("proj_drop_rate", 0.0),
        }
        for stage, n, count in zip(self.layers, agents, agent_blocks, strict=True):
            for index, block in enumerate(stage.blocks[:count]):
                stage.blocks[index] = AgentSwinBlock(
                    block.dim,
                    block.input_resolution,
                    block.attn.num_heads,
                    n,
                    mlp_ratio=block.mlp_ratio,
                    drop_path=getattr(block.drop_path1, "drop_prob", 0.0),
                    **shared,
                )

    def rename_published(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename published weights for this model."""
        # timm converts the names and windows of the original Swin Transformer.
        return renamed(checkpoint_filter_fn(weights, self), [BIAS])


default_cfgs = generate_default_cfgs(
    {
        f"agent_swin_{size}": data_config("patch_embed.proj", "head.fc")
        for size in ("tiny", "small", "base")
    }
)


@register_model  # type: ignore[untyped-decorator]
def agent_swin_tiny(pretrained: bool = False, **options: Any) -> AgentSwin:
    """Agent-Swin-T, 28.9 million parameters; agents in the first three stages."""
    own: dict[str, Any] = {"depths": (2, 2, 6, 2), "agent_blocks": (2, 2, 6, 0)}
    return create(AgentSwin, "agent_swin_tiny", pretrained, **own | options)


@register_model  # type: ignore[untyped-decorator]
def agent_swin_small(pretrained: bool = False, **options: Any) -> AgentSwin:
    """Agent-Swin-S, 49.7 million parameters; agents in the first two stages."""
    own: dict[str, Any] = {"depths": (2, 2, 18, 2), "agent_blocks": (2, 2, 0, 0)}
    return create(AgentSwin, "agent_swin_small", pretrained, **own | options)


@register_model  # type: ignore[untyped-decorator]
def agent_swin_base(pretrained: bool = False, **options: Any) -> AgentSwin:
    """Agent-Swin-B, 88.1 million parameters; agents in the first two blocks of three stages."""
    own: dict[str, Any] = {
        "embed_dim": 128,
        "depths": (2, 2, 18, 2),
        "num_heads": (4, 8, 16, 32),
        "agent_blocks": (2, 2, 2, 0),
    }
    return create(AgentSwin, "agent_swin_base", pretrained, **own | options)
