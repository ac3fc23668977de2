"""Strict models of settings, and the YAML that they are read from and written as."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from .errors import AgentSDError

if TYPE_CHECKING:
    from typing_extensions import Self


def short_repr(value: object) -> str:
    """The ``repr`` of a value, cut to a length that fits an error message."""
    return _SHORT.repr(value)


_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2
_SHORT.maxstring = _SHORT.maxother = 200


class StrictModel(BaseModel):
    """Base of agentsd's settings: frozen; unknown keys, wrong types and NaN are errors.

    Raises:
        AgentSDError: Of the class's own kind, ``error``, in place of pydantic's; names each key
            that is wrong, its value and what is allowed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    error: ClassVar[type[AgentSDError]] = AgentSDError

    def __init__(self, /, **data: Any) -> None:
        with self._errors_of_ours():
            super().__init__(**data)

    @classmethod
    def model_validate(cls, *args: Any, **kwargs: Any) -> Self:
        with cls._errors_of_ours():
            return super().model_validate(*args, **kwargs)

    @classmethod
    def model_validate_json(cls, *args: Any, **kwargs: Any) -> Self:
        with cls._errors_of_ours():
            return super().model_validate_json(*args, **kwargs)

    @classmethod
    def model_validate_strings(cls, *args: Any, **kwargs: Any) -> Self:
        with cls._errors_of_ours():
            return super().model_validate_strings(*args, **kwargs)

    @classmethod
    @contextmanager
    def _errors_of_ours(cls) -> Iterator[None]:
        try:
            yield
        except ValidationError as error:
            raise cls.error(_format_errors(error, list(cls.model_fields))) from None


def parse_yaml(text: str, place: str, error: type[AgentSDError]) -> Any:
    """Parse YAML text into plain values; nothing in it is executed.

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
        raise error(f"{place}: not valid YAML ({short_repr(str(problem))})") from None


def dump_yaml(data: Any) -> str:
    """Plain values as YAML text, a line each."""
    out = StringIO()
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.dump(data, out)
    return out.getvalue()


def _format_errors(error: ValidationError, names: list[str]) -> str:
    """Format each problem as ``key: what is allowed (got value)``."""
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
            where = f"{key}: " if key else ""
            lines.append(f"{where}{says} (got {short_repr(problem['input'])})")
    return "; ".join(lines)
