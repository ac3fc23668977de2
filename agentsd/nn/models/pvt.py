"""Agent-PVT: a pyramid vision Transformer with agents in all stages (arXiv 2102.12122)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor

from ..attention import AgentAttention
from ..published import BIAS, renamed
from .pyramid import Pyramid, StageSpec
from .registration import create, data_config

__all__ = ["AgentPVT"]  # timm adds the models

WIDTHS, HEADS, MLP_RATIOS = (64, 128, 320, 512), (1, 2, 5, 8), (8, 8, 4, 4)
PUBLISHED_NAMES = (
    *((rf"^patch_embed{i + 1}\.", f"stages.{i}.") for i in range(4)),
    *((rf"^pos_embed{i + 1}$", f"stages.{i}.pos_embed") for i in range(4)),
    *((rf"^block{i + 1}\.", f"stages.{i}.blocks.") for i in range(4)),
    BIAS,
)


class AgentPVT(Pyramid):
    """A pyramid vision Transformer whose blocks attend through agents, without reduced keys.

    Args:
        depths: Blocks of each stage.
        agents: Number of agents in each stage, square numbers.
        attn_drop_rate: Dropout of the softmaxes' weights.
        options: Those of :class:`~agentsd.nn.pyramid.Pyramid`, such as ``img_size``.
    """

    def __init__(
        self,
        depths: Sequence[int],
        agents: Sequence[int] = (9, 16, 49, 49),
        attn_drop_rate: float = 0.0,
        **options: Any,
    ) -> None:
        shared = {"attn_drop": attn_drop_rate, "proj_drop": options.get("proj_drop_rate", 0.0)}
        stages = [
            StageSpec(
                depth,
                width,
                heads,
                ratio,
                reduction=(2, 2, 0) if index else (4, 4, 0),
                attention=partial(AgentAttention, width, heads, agents=n, **shared),
            )
            for index, (depth, width, heads, ratio, n) in enumerate(
                zip(depths, WIDTHS, HEADS, MLP_RATIOS, agents, strict=True)
            )
        ]
        super().__init__(stages, position=True, final_norm=False, norm_eps=1e-6, **options)

    def rename_published(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename published weights for this model, and join queries, keys and values."""
        weights = renamed(weights, PUBLISHED_NAMES)
        for name in [name for name in weights if re.search(r"\.attn\.q\.\w+$", name)]:
            kv = weights.pop(name.replace(".attn.q.", ".attn.kv."))
            weights[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat([weights.pop(name), kv])
        return weights


default_cfgs = generate_default_cfgs(
    {
        f"agent_pvt_{size}": data_config("stages.0.proj")
        for size in ("tiny", "small", "medium", "large")
    }
)


@register_model  # type: ignore[untyped-decorator]
def agent_pvt_tiny(pretrained: bool = False, **options: Any) -> AgentPVT:
    """Agent-PVT-T, 11.6 million parameters."""
    return create(AgentPVT, "agent_pvt_tiny", pretrained, **{"depths": (2, 2, 2, 2)} | options)


@register_model  # type: ignore[untyped-decorator]
def agent_pvt_small(pretrained: bool = False, **options: Any) -> AgentPVT:
    """Agent-PVT-S, 20.6 million parameters."""
    return create(AgentPVT, "agent_pvt_small", pretrained, **{"depths": (3, 4, 6, 3)} | options)


@register_model  # type: ignore[untyped-decorator]
def agent_pvt_medium(pretrained: bool = False, **options: Any) -> AgentPVT:
    """Agent-PVT-M, 35.9 million parameters."""
    return create(AgentPVT, "agent_pvt_medium", pretrained, **{"depths": (3, 4, 18, 3)} | options)


@register_model  # type: ignore[untyped-decorator]
def agent_pvt_large(pretrained: bool = False, **options: Any) -> AgentPVT:
    """Agent-PVT-L, 48.7 million parameters."""
    return create(AgentPVT, "agent_pvt_large", pretrained, **{"depths": (3, 8, 27, 3)} | options)
