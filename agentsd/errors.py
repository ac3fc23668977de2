"""The errors agentsd raises. Each message says what was wrong, what is allowed and what to do."""


class AgentSDError(Exception):
    """Base of every error that agentsd raises on purpose."""

    exit_code = 1
    """What the command line exits with."""


class ScheduleError(AgentSDError, ValueError):
    """A schedule or phase has an unknown key, a wrong type or a value out of range."""

    exit_code = 2


class SettingsError(AgentSDError, ValueError):
    """A setting of an image is of the wrong type or out of range."""

    exit_code = 2


class PatchError(AgentSDError):
    """The given object has no UNet that agentsd can patch, or no layer of it matches."""


class LoadError(AgentSDError):
    """A model could not be loaded."""


class GenerationError(AgentSDError):
    """The pipeline failed while it made an image, or made none that can be shown."""


class OutOfMemoryError(GenerationError):
    """The device does not have enough memory for the batch; a smaller one may fit."""


class OutputError(AgentSDError):
    """A result could not be written."""


class EvaluationError(AgentSDError):
    """Images, features or figures cannot be measured as asked."""


class ProtocolError(AgentSDError, ValueError):
    """An evaluation protocol has an unknown key, a wrong type or a value out of range."""

    exit_code = 2
