"""``full``: the original attention, for steps that should stay unpatched."""

from __future__ import annotations

from typing import ClassVar, Literal

from .base import BasePhase, Plan


class Full(BasePhase):
    """Unpatched attention. Its parameters are shared by all methods.

    Args:
        until: The phase ends at this share of the run, in (0, 1]. All phases except the last need
            this or ``until_step``; the last one runs to the end.
        until_step: The same as a number of steps, at least 1.
        max_downsample: Patch layers down to this resolution: 1 (top), 2, 4 or 8. ``None`` means
            only the highest resolution at which the model has self-attention.
        min_tokens: Leave layers with fewer tokens unpatched. ``None`` means the device's default
            (:data:`agentsd.patching.runtime.MIN_TOKENS`), from which patching saves time; 0
            patches all layers.
        cache: Which steps are light; ``None`` (default) computes the whole UNet in every step.

    Raises:
        ScheduleError: On wrong types, values out of range, or parameters that the method does not
            read, so that no setting is silently ignored.

    Example:
        >>> Full(until=0.2).is_active_at(4, 25), Full(until=0.2).is_active_at(5, 25)
        (True, False)
    """

    summary: ClassVar = "as unpatched"

    method: Literal["full"] = "full"

    def plan(self, height: int, width: int) -> Plan:
        """Count the tokens; nothing is merged."""
        tokens = height * width
        return Plan(tokens, tokens, 0, tokens)

    def stages(self, plan: Plan) -> tuple[str, ...]:
        """Short descriptions of the tokens left after each stage of a plan."""
        return ("as unpatched",)
