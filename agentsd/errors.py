"""The errors of agentsd; a message says what was wrong, what is allowed and what to do next."""


class AgentSDError(Exception):
    """Base of all errors that agentsd raises on purpose."""

    exit_code = 2
    """Exit code of the command: 2 if an input (an option, file, model or device) cannot be used, 1
    if the work failed."""


class ScheduleError(AgentSDError, ValueError):
    """A schedule or phase has an unknown key, a wrong type or a value out of range."""


class SettingsError(AgentSDError, ValueError):
    """A setting of an image has the wrong type or is out of range."""


class PatchError(AgentSDError):
    """The object has no UNet that agentsd can patch, or no layer matches."""


class ModelError(AgentSDError, ValueError):
    """A trainable layer or model cannot be built, or does not fit its input."""


class LoadError(AgentSDError):
    """A model could not be loaded."""


class GenerationError(AgentSDError):
    """The pipeline failed while generating, or its image cannot be shown."""

    exit_code = 1


class OutOfMemoryError(GenerationError):
    """The device does not have enough memory for the batch; a smaller one may fit."""


class OutputError(AgentSDError):
    """An output file could not be written."""

    exit_code = 1


class EvaluationError(AgentSDError):
    """Images cannot be evaluated as requested."""


class ProtocolError(AgentSDError, ValueError):
    """An evaluation protocol has an unknown key, a wrong type or a value out of range."""


class MissingPackageError(AgentSDError, ImportError):
    """An optional package is not installed."""

    def __init__(self, packages: str, purpose: str, extra: str) -> None:
        super().__init__(f'{purpose} needs {packages}: pip install "agentsd[{extra}]"')
