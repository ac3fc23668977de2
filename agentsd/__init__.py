"""agentsd: Stable Diffusion with agent attention and token merging, faster without training."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__ as __version__

if TYPE_CHECKING:
    from .errors import (
        AgentSDError,
        EvaluationError,
        GenerationError,
        LoadError,
        MissingPackageError,
        OutputError,
        PatchError,
        ScheduleError,
        SettingsError,
    )
    from .methods import Agent, Cache, Full, Keys, Merge, Phase
    from .models.loading import load_pipeline
    from .patching.inspection import Inspection, inspect_patch
    from .patching.patch import apply_patch, patched, remove_patch
    from .patching.step_cache import cache_context
    from .patching.summary import Summary, summary
    from .schedule import Schedule
    from .tuning.tune import Tuning, tune

__all__ = [
    "Agent",
    "AgentSDError",
    "Cache",
    "EvaluationError",
    "Full",
    "GenerationError",
    "Inspection",
    "Keys",
    "LoadError",
    "Merge",
    "MissingPackageError",
    "OutputError",
    "PatchError",
    "Phase",
    "Schedule",
    "ScheduleError",
    "SettingsError",
    "Summary",
    "Tuning",
    "apply_patch",
    "cache_context",
    "inspect_patch",
    "load_pipeline",
    "patched",
    "remove_patch",
    "summary",
    "tune",
]


_HOMES = (
    "errors",
    "methods",
    "schedule",
    "patching.inspection",
    "patching.patch",
    "patching.step_cache",
    "patching.summary",
    "models.loading",
    "tuning.tune",
)
"""Modules of the public names, the cheap ones first."""


def __getattr__(name: str) -> Any:
    """Load a public name when it is first asked for: diffusers takes seconds to import."""
    if name in __all__:
        for module in _HOMES:
            home = import_module(f".{module}", __name__)
            if name in vars(home):
                return getattr(home, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
