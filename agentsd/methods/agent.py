"""``agent``: agent attention over merged tokens (Han et al., ECCV 2024, arXiv 2312.08874)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..errors import ScheduleError
from .agent_attention import agent_attention
from .base import ADVANCED, Count, Plan, SelfAttention, Share, Stride
from .merge import (
    HEIGHT,
    RATIO,
    WIDTH,
    Merging,
    capped,
    merged_attention,
    owners_of,
    softmax_attention,
)
from .observation import Observation, attended_most
from .token_grid import strides_for
from .token_merging import merge

AGENT_RATIO = "Share of tokens merged to make the agents. Higher: fewer agents, faster, coarser."
AGENTS = "Maximum number of agents at any image size. Fewer: faster, coarser."
SCALE = "Lower: each token attends to fewer agents. No effect on speed."
SHORTCUT = "Share of the values added to the output; restores variety. No effect on speed."


class Agent(Merging):
    """Merged tokens attend through a few agents, at a cost linear in the number of tokens.

    The defaults match the first phase of the published schedule.

    Args:
        agent_ratio: Share of the tokens merged to make the agents, in [0, 1], capped like
            ``ratio``. Agents are used only if there are fewer than half as many as merged tokens.
        agents: Maximum number of agents at any resolution, 1 to 65,536; cells grow beyond
            ``sx`` × ``sy`` to stay within it. Replaces ``agent_ratio``.
        k_scale2: Exponent of the scale of the agents' broadcast softmax, in (0, 2].
        k_shortcut: Share of the values added to the output, in [-1, 1].
        ratio, sx, sy, use_rand, merge_crossattn, merge_mlp, attn_precision: As for :class:`Merge`.
        until, until_step, max_downsample, min_tokens, cache: As for :class:`Full`.

    Raises:
        ScheduleError: As for :class:`Full`.

    Example:
        >>> Agent().plan(64, 64)
        Plan(tokens=4096, merged_tokens=2458, agents=256, keys=2458)
    """

    summary: ClassVar = "queries reach the keys through a few agent tokens"
    replaces: ClassVar = {"agents": "agent_ratio"}

    method: Literal["agent"] = "agent"
    ratio: Annotated[Share, Field(description=RATIO, examples=[0.2, 0.4, 0.6])] = 0.4
    sx: Annotated[Stride, Field(description=WIDTH)] = 4
    sy: Annotated[Stride, Field(description=HEIGHT)] = 4
    agent_ratio: Annotated[Share, Field(description=AGENT_RATIO, examples=[0.8, 0.95])] = 0.95
    agents: Annotated[Count | None, Field(description=AGENTS, examples=[64, 256])] = None
    k_scale2: Annotated[
        float,
        Field(gt=0, le=2, description=SCALE, examples=[0.3, 0.5, 1], json_schema_extra=ADVANCED),
    ] = 0.3
    k_shortcut: Annotated[
        float,
        Field(
            ge=-1,
            le=1,
            description=SHORTCUT,
            examples=[0, 0.075, 0.15],
            json_schema_extra=ADVANCED,
        ),
    ] = 0.075

    def model_post_init(self, context: Any) -> None:
        super().model_post_init(context)
        if self.agents is not None and "agent_ratio" in self.model_fields_set:
            raise ScheduleError("agents replaces agent_ratio; drop agent_ratio")

    def strides(self, height: int, width: int) -> tuple[int, int]:
        """Height and width ``(sy, sx)`` of the cells on a grid of ``height × width`` tokens."""
        if self.agents is None:
            return self.sy, self.sx
        sy, sx = strides_for(height, width, self.agents, partial=False)
        return max(sy, self.sy), max(sx, self.sx)

    def plan(self, height: int, width: int) -> Plan:
        """Count the merged tokens, and the agents that they attend through."""
        plan, destinations = self.merged_plan(height, width)
        if not destinations:
            return plan
        ratio = self.agent_ratio if self.agents is None else 1.0
        agents = plan.tokens - min(plan.tokens - destinations, int(plan.tokens * ratio))
        return plan._replace(agents=agents) if 2 * agents < plan.merged_tokens else plan

    def attention(
        self, layer: SelfAttention, x: Tensor, chosen: Tensor, plan: Plan
    ) -> tuple[Tensor, Tensor | None]:
        """Merge into the chosen tokens, attend through the agents, unmerge."""
        attend = self._through_agents if plan.agents else softmax_attention
        return merged_attention(layer, x, owners_of(x, chosen, plan), plan, attend)

    def _through_agents(
        self, layer: SelfAttention, q: Tensor, k: Tensor, v: Tensor, agents: Tensor
    ) -> Tensor:
        scale, shortcut = self.k_scale2, self.k_shortcut
        return agent_attention(
            q, k, v, agents, k_scale2=scale, k_shortcut=shortcut, attend=layer.attend
        )

    def observe(self, layer: SelfAttention, x: Tensor, chosen: Tensor, plan: Plan) -> Observation:
        """Observe the merging, the agents, and which of them each token attends to most."""
        owner, *agent_owner = owners_of(x[-1:], chosen, plan)[:, 0]  # each [N]
        if not agent_owner:
            return Observation(owner)
        agent = agent_owner[0] - plan.merged_tokens  # [N]
        q, a = (
            layer.queries(merge(x[-1:], index[None], count)[None])[0]  # [H, ·, d]
            for index, count in ((owner, plan.merged_tokens), (agent, plan.agents))
        )
        attended = attended_most(q, a, (q.shape[-1] ** -0.5) ** self.k_scale2)
        unmerged = (agent >= len(chosen)).nonzero()[:, 0]
        places = torch.cat([chosen, unmerged])  # destinations come first, then unmerged tokens
        return Observation(owner, "agents", places, agent, attended[owner])

    def stages(self, plan: Plan) -> tuple[str, ...]:
        """Short descriptions of the tokens left after each stage of a plan."""
        agents = (f"{plan.agents:,} agents",) if plan.agents else ()
        return super().stages(plan) + agents

    def caps(self, plan: Plan) -> list[str]:
        """Explain where a plan differs from the requested parameters."""
        notes = super().caps(plan)
        if not plan.agents:
            notes.append("no agents: there would be at least half as many as merged tokens")
        elif self.agents is None:
            merged = plan.tokens - plan.agents
            notes += capped("agent_ratio", self.agent_ratio, merged, plan.tokens)
        return notes
