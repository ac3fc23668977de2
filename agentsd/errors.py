"""The errors agentsd raises. Each message says what was wrong, what is allowed and what to do."""


class AgentSDError(Exception):
    """Base of every error that agentsd raises on purpose."""


class ScheduleError(AgentSDError, ValueError):
    """A schedule or phase has an unknown key, a wrong type or a value out of range."""


class PatchError(AgentSDError):
    """The given object has no UNet that agentsd can patch, or no layer of it matches."""


class LoadError(AgentSDError):
    """A model could not be loaded."""


class GenerationError(AgentSDError, ValueError):
    """A generation setting is out of range, or its output cannot be written."""
