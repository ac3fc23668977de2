"""``full``: the original attention, for steps that should stay unpatched."""

from __future__ import annotations

from typing import ClassVar, Literal

from .base import Phase, Plan


class Full(Phase):
    """Attention as unpatched, with no parameters beyond :class:`~agentsd.methods.base.Phase`."""

    summary: ClassVar = "as unpatched"

    method: Literal["full"] = "full"

    def plan(self, height: int, width: int) -> Plan:
        """Count the tokens; none are merged."""
        tokens = height * width
        return Plan(tokens, tokens, 0, tokens)

    def stages(self, plan: Plan) -> tuple[str, ...]:
        """The tokens left after each stage of a plan, in a few words."""
        return ("as unpatched",)
