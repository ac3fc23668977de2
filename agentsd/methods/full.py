"""``full``: the layer as it is, for the steps of a run that are to be left alone."""

from __future__ import annotations

from typing import ClassVar, Literal

from .base import Phase, Plan


class Full(Phase):
    """Attention as unpatched; see :class:`~agentsd.methods.base.Phase` for what it shares."""

    summary: ClassVar = "as unpatched"

    method: Literal["full"] = "full"

    def plan(self, height: int, width: int) -> Plan:
        """Count nothing but the tokens."""
        tokens = height * width
        return Plan(tokens, tokens, 0, tokens)

    def stages(self, plan: Plan) -> tuple[str, ...]:
        """What the tokens of a plan become, in a few words."""
        return ("as unpatched",)
