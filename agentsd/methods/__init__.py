"""The attention methods that a phase can use: pure PyTorch, one file per method.

To add a method, put a subclass of :class:`~agentsd.methods.base.BasePhase` in a new file here and
add it to :data:`Phase`.
"""

from typing import get_args

from .agent import Agent
from .base import BasePhase, Cache, Plan
from .full import Full
from .keys import Keys
from .merge import Merge

Phase = Agent | Full | Keys | Merge
"""A phase of a schedule: one of the methods, discriminated by its ``method`` field."""

METHODS: dict[str, type[Phase]] = {kind.method_name(): kind for kind in get_args(Phase)}
"""Methods by name."""

__all__ = ["METHODS", "Agent", "BasePhase", "Cache", "Full", "Keys", "Merge", "Phase", "Plan"]
