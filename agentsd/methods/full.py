"""``full``: the original attention, for steps that should stay unpatched."""

from __future__ import annotations

from typing import ClassVar, Literal

from .base import BasePhase, Plan


class Full(BasePhase):
    """Attention as unpatched, with the parameters of all phases alone."""

    summary: ClassVar = "as unpatched"

    method: Literal["full"] = "full"

    def plan(self, height: int, width: int) -> Plan:
        """Count the tokens; none are merged."""
        tokens = height * width
        return Plan(tokens, tokens, 0, tokens)

    def stages(self, plan: Plan) -> tuple[str, ...]:
        """The tokens left after each stage of a plan, in a few words."""
        return ("as unpatched",)
