"""Settings that cannot be wrong: frozen, unknown keys and loose types refused, errors told.

And the YAML that they are read from and written as.
"""

from __future__ import annotations

import difflib
import reprlib
from io import StringIO
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from .errors import AgentSDError


def shown(value: object) -> str:
    """A value as an error shows it: at a length for people, whatever a file may hold."""
    return _SHORT.repr(value)


_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2
_SHORT.maxstring = _SHORT.maxother = 200


class Strict(BaseModel):
    """Base of agentsd's settings; what is wrong with them is told as ``error``."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    error: ClassVar[type[AgentSDError]] = AgentSDError

    def __init__(self, /, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise self.error(_tell(error, list(type(self).model_fields))) from None


def parse_yaml(text: str, place: str, error: type[AgentSDError]) -> Any:
    """What YAML text holds: plain values, nothing is executed.

    Args:
        text: What to read.
        place: Where it is from, for the error.
        error: The kind of error to raise.

    Raises:
        error: Names the place and the line.
    """
    try:
        return YAML(typ="safe", pure=True).load(text)
    except YAMLError as problem:
        mark = getattr(problem, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        what = getattr(problem, "problem", None) or str(problem).splitlines()[0]
        raise error(f"{place}:{line} not valid YAML ({what})") from None
    except (ValueError, KeyError, RecursionError) as problem:  # of values that are none, or depth
        raise error(f"{place}: not valid YAML ({shown(str(problem))})") from None


def dump_yaml(data: Any) -> str:
    """Plain values as YAML text, a line each."""
    out = StringIO()
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.dump(data, out)
    return out.getvalue()


def _tell(error: ValidationError, names: list[str]) -> str:
    """Say each problem as ``key: what is allowed (got value)``."""
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            close = difflib.get_close_matches(key.lower(), names, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            lines.append(f"unknown key {key!r}: {hint}allowed are {', '.join(names)}")
        elif problem["type"] == "value_error":
            lines.append(str(problem["ctx"]["error"]))
        elif problem["type"] == "missing":
            lines.append(f"{key}: is missing")
        else:
            says = problem["msg"][0].lower() + problem["msg"][1:]
            lines.append(f"{key}: {says} (got {shown(problem['input'])})")
    return "; ".join(lines)
