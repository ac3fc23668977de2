"""What a phase of a schedule can do to self-attention: pure PyTorch, one file per method.

To add a method, add a file with a subclass of :class:`~agentsd.methods.base.BasePhase` to this
folder, and the class to :data:`Phase`.
"""

from typing import get_args

from .agent import Agent
from .base import BasePhase, Cache, Plan
from .full import Full
from .keys import Keys
from .merge import Merge

Phase = Agent | Full | Keys | Merge
"""A phase of a schedule: one of the methods, told apart by ``method``."""

METHODS: dict[str, type[Phase]] = {kind.method_name(): kind for kind in get_args(Phase)}
"""The methods by name."""

__all__ = ["METHODS", "Agent", "BasePhase", "Cache", "Full", "Keys", "Merge", "Phase", "Plan"]
