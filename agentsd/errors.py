"""The errors of agentsd; a message says what was wrong, what is allowed and what to do next."""


class AgentSDError(Exception):
    """Base of all errors that agentsd raises on purpose."""

    exit_code = 1
    """Exit status of the command line."""


class ScheduleError(AgentSDError, ValueError):
    """A schedule or phase has an unknown key, a wrong type or a value out of range."""

    exit_code = 2


class SettingsError(AgentSDError, ValueError):
    """A setting of an image has the wrong type or is out of range."""

    exit_code = 2


class PatchError(AgentSDError):
    """The object has no UNet that agentsd can patch, or no layer matches."""


class LoadError(AgentSDError):
    """A model could not be loaded."""


class GenerationError(AgentSDError):
    """The pipeline failed while generating, or its image cannot be shown."""


class OutOfMemoryError(GenerationError):
    """The device does not have enough memory for the batch; a smaller one may fit."""


class OutputError(AgentSDError):
    """An output file could not be written."""


class EvaluationError(AgentSDError):
    """Images cannot be evaluated as requested."""


class ProtocolError(AgentSDError, ValueError):
    """An evaluation protocol has an unknown key, a wrong type or a value out of range."""

    exit_code = 2
