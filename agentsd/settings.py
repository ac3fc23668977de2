"""Strict models of settings, and the YAML that they are read from and written as."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import (
    BaseModel,
    ConfigDict,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_core import PydanticCustomError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from .errors import AgentSDError

if TYPE_CHECKING:
    from typing_extensions import Self


def short_repr(value: object) -> str:
    """The ``repr`` of a value, cut to a length that fits an error message."""
    return _SHORT.repr(value)


def _check_whole(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    if type(value) is int:
        return check(value)
    try:
        return check(None)
    except ValidationError as error:
        raise PydanticCustomError("literal_error", error.errors()[0]["msg"]) from None


Whole = WrapValidator(_check_whole)
"""Of a ``Literal`` of integers, which compares with ``==`` and so lets True and 1.0 pass for 1."""

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

    if not TYPE_CHECKING:  # type checkers and editors see the fields as keywords instead

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
            raise cls.error("; ".join(map(cls._describe, error.errors()))) from None

    @classmethod
    def unknown_key(cls, key: str) -> str:
        """What is said of a key that is no field."""
        close = difflib.get_close_matches(key.lower(), cls.model_fields, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return f"unknown key {key!r}: {hint}allowed are {', '.join(cls.model_fields)}"

    @classmethod
    def place(cls, location: tuple[int | str, ...]) -> str:
        """How a message names the place of a value in nested ones."""
        return ".".join(map(str, location))

    @classmethod
    def _describe(cls, problem: Any) -> str:
        """One problem as ``key: what is allowed (got value)``."""
        kind, place, context = problem["type"], problem["loc"], problem.get("ctx", {})
        key = cls.place(place)
        prefix = f"{key}: " if key else ""
        if kind == "extra_forbidden" and len(place) == 1:
            return cls.unknown_key(key)
        if kind == "value_error":
            # A nested model names its own keys alone; a validator writes the whole message.
            nested = isinstance(context["error"].__context__, ValidationError)
            return f"{prefix if nested else ''}{context['error']}"
        if kind == "missing":
            return f"{prefix}is missing"
        says, value = problem["msg"][0].lower() + problem["msg"][1:], problem["input"]
        if kind == "union_tag_invalid":
            name = context["discriminator"].strip("'")
            says, value = f"{name}: input should be one of {context['expected_tags']}", value[name]
        return f"{prefix}{says} (got {short_repr(value)})"


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
    except (
        ValueError,
        KeyError,
        RecursionError,
    ) as problem:  # bad scalars, or nesting too deep
        raise error(f"{place}: not valid YAML ({short_repr(str(problem))})") from None


def dump_yaml(data: Any) -> str:
    """Plain values as YAML text, a line each."""
    out = StringIO()
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.dump(data, out)
    return out.getvalue()
