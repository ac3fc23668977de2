"""Agent-DeiT: timm's vision Transformer, with agent attention in its blocks."""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.layers import LayerNorm
from timm.models import generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor

from ...errors import ModelError
from ..attention import AgentAttention
from ..published import BIAS, renamed
from .registration import create, data_config

__all__ = ["AgentDeiT"]  # timm adds the models


class ClassTokenAttention(AgentAttention):
    """The layer with the interface that timm's blocks expect."""

    def forward(  # type: ignore[override]  # a mask in place of the grid
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Attend like :class:`AgentAttention`; masks are rejected."""
        if attn_mask is not None or is_causal:
            raise ModelError("agent attention pools its agents from all tokens; drop the mask")
        return super().forward(x)


class AgentDeiT(VisionTransformer):  # type: ignore[misc]  # timm is untyped
    """A vision Transformer with a class token, whose blocks attend through agents.

    Args:
        agents: Number of agents, a square number.
        agent_blocks: Blocks that have them, counted from the first; ``None`` for all.
        options: Those of timm's ``VisionTransformer``, such as ``img_size`` and ``num_classes``.
    """

    def __init__(self, agents: int = 49, agent_blocks: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        for block in self.blocks[:agent_blocks]:
            block.attn = ClassTokenAttention(
                self.embed_dim,
                block.attn.num_heads,
                grid=self.patch_embed.grid_size,
                agents=agents,
                class_token=True,
                attn_drop=options.get("attn_drop_rate", 0.0),
                proj_drop=options.get("proj_drop_rate", 0.0),
                device=options.get("device"),
                dtype=options.get("dtype"),
            )

    def set_input_size(
        self,
        img_size: tuple[int, int] | None = None,
        patch_size: tuple[int, int] | None = None,
    ) -> None:
        """Change the image size; position embedding and biases are resized."""
        super().set_input_size(img_size, patch_size)
        for block in self.blocks:
            if isinstance(block.attn, AgentAttention):
                block.attn.set_grid(self.patch_embed.grid_size)

    def rename_published(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename published weights for this model."""
        # timm resizes the position embedding.
        return renamed(checkpoint_filter_fn(weights, self), [BIAS])


def _create(variant: str, pretrained: bool, **options: Any) -> AgentDeiT:
    fixed = {"patch_size": 16, "depth": 12, "norm_layer": partial(LayerNorm, eps=1e-6)}
    features = {"out_indices": 3, "feature_cls": "getter"}
    return create(AgentDeiT, variant, pretrained, features, **fixed | options)


default_cfgs = generate_default_cfgs(
    {f"agent_deit_{size}": data_config("patch_embed.proj") for size in ("tiny", "small", "base")}
)


@register_model  # type: ignore[untyped-decorator]
def agent_deit_tiny(pretrained: bool = False, **options: Any) -> AgentDeiT:
    """Agent-DeiT-T, 6.0 million parameters."""
    return _create("agent_deit_tiny", pretrained, **{"embed_dim": 192, "num_heads": 3} | options)


@register_model  # type: ignore[untyped-decorator]
def agent_deit_small(pretrained: bool = False, **options: Any) -> AgentDeiT:
    """Agent-DeiT-S, 22.6 million parameters."""
    return _create("agent_deit_small", pretrained, **{"embed_dim": 384, "num_heads": 6} | options)


@register_model  # type: ignore[untyped-decorator]
def agent_deit_base(pretrained: bool = False, **options: Any) -> AgentDeiT:
    """Agent-DeiT-B, 87.2 million parameters; 81 agents in the first four blocks."""
    own: dict[str, Any] = {"embed_dim": 768, "num_heads": 12, "agents": 81, "agent_blocks": 4}
    return _create("agent_deit_base", pretrained, **own | options)
