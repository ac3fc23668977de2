"""``agent``: agent attention over merged tokens (Han et al., ECCV 2024, arXiv 2312.08874)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from ..errors import ScheduleError
from .agent_attention import agent_attention
from .base import Count, Phase, Plan, SelfAttention, Share
from .merge import Merge, capped
from .token_grid import strides_for

AGENTS = "At most so many at any size. Fewer: faster, coarser."
AGENT_RATIO = "Share merged to make the agents. More: fewer agents, faster."
SCALE = "Lower: each place listens to fewer agents. Costs nothing."
SHORTCUT = "Share of the values added; brings variety back. Costs nothing."


class Agent(Merge):
    """Merged tokens attend through a few agents, at a cost linear in their number.

    It has the parameters of :class:`~agentsd.methods.merge.Merge`, and more.

    Args:
        agent_ratio: Share of the tokens merged to make the agents, in [0, 1], capped as ``ratio``
            is. Agents are used only where twice their number is below the merged tokens' number.
        agents: At most so many agents, at any resolution: where there would be more, cells are
            larger than ``sx`` × ``sy``. Instead of ``agent_ratio``.
        k_scale2: Exponent of the scale of the agents' broadcast softmax, in (0, 2].
        k_shortcut: Share of the values added to the output, in [-1, 1].
    """

    summary: ClassVar = "a few agents stand between queries and keys"

    method: Literal["agent"] = "agent"  # type: ignore[assignment]  # a method of its own
    agent_ratio: Annotated[Share, Field(description=AGENT_RATIO)] = 0.8
    agents: Annotated[Count | None, Field(description=AGENTS)] = None
    k_scale2: Annotated[float, Field(gt=0, le=2, description=SCALE)] = 0.3
    k_shortcut: Annotated[float, Field(ge=-1, le=1, description=SHORTCUT)] = 0.075

    def model_post_init(self, context: Any) -> None:
        super().model_post_init(context)
        if self.agents is not None and "agent_ratio" in self.model_fields_set:
            raise ScheduleError("agents says how many there may be; drop agent_ratio")

    def strides(self, height: int, width: int) -> tuple[int, int]:
        """Height and width ``(sy, sx)`` of the cells on a grid of ``height × width`` tokens."""
        if self.agents is None:
            return self.sy, self.sx
        sy, sx = strides_for(height, width, self.agents, partial=False)
        return max(sy, self.sy), max(sx, self.sx)

    def _agents(self, tokens: int, destinations: int, merged: int) -> int:
        ratio = self.agent_ratio if self.agents is None else 1.0
        agents = tokens - min(tokens - destinations, int(tokens * ratio))
        return agents if 2 * agents < merged else 0

    def _through_agents(
        self, layer: SelfAttention, q: Tensor, k: Tensor, v: Tensor, agents: Tensor
    ) -> Tensor:
        scales = {"k_scale2": self.k_scale2, "k_shortcut": self.k_shortcut}
        return agent_attention(q, k, v, agents, **scales, attend=layer.attend)

    def stages(self, plan: Plan) -> tuple[str, ...]:
        """What the tokens of a plan become, one after the other, in a few words."""
        agents = (f"{plan.agents:,} agents",) if plan.agents else ()
        return super().stages(plan) + agents

    def caps(self, plan: Plan) -> list[str]:
        """Where a plan is not what the parameters ask for, and why."""
        found = super().caps(plan)
        if not plan.agents:
            found.append("agents off: they must be fewer than half of the merged tokens")
        elif self.agents is None:
            merged = plan.tokens - plan.agents
            found += capped("agent_ratio", self.agent_ratio, merged, plan.tokens)
        return found

    def override(self, **changes: Any) -> Phase:
        """A copy with those parameters changed that its method reads."""
        # The newer way of saying how many agents there are takes the place of the older.
        ways = {"agents", "agent_ratio"}
        dropped = ways if ways & changes.keys() else set()
        kept = {k: v for k, v in self.to_dict().items() if k not in dropped}
        return Phase(**kept | {k: v for k, v in changes.items() if k in self.parameters()})

    def to_dict(self) -> dict[str, Any]:
        """The method, its end and every parameter in effect, without those that are None."""
        idle = "agent_ratio" if self.agents is not None else None
        return {name: value for name, value in super().to_dict().items() if name != idle}
