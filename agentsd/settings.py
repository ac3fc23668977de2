"""Strict pydantic models for settings, and reading and writing YAML."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from .errors import AgentSDError

if TYPE_CHECKING:
    from typing_extensions import Self


def short_repr(value: object) -> str:
    """The ``repr`` of a value, shortened to fit an error message."""
    return _SHORT.repr(value)


class _NotAnInt:
    """Shown like a value, but equal to no other."""

    def __init__(self, value: object) -> None:
        self._value = value

    def __repr__(self) -> str:
        return repr(self._value)


Whole = BeforeValidator(lambda value: value if type(value) is int else _NotAnInt(value))
"""For a ``Literal`` of integers, which compares with ``==`` and so would accept True as 1."""

_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2
_SHORT.maxstring = _SHORT.maxother = 200


class StrictModel(BaseModel):
    """Base of agentsd's settings: frozen; unknown keys, wrong types and NaN are errors.

    Raises:
        AgentSDError: Of the class's own type, ``error``, instead of pydantic's; names each invalid
            key, its value and what is allowed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    error: ClassVar[type[AgentSDError]] = AgentSDError

    if not TYPE_CHECKING:  # type checkers and editors see the fields as keywords instead

        def __init__(self, /, **data: Any) -> None:
            with self._own_errors():
                super().__init__(**data)

    @classmethod
    def model_validate(cls, *args: Any, **kwargs: Any) -> Self:
        with cls._own_errors():
            return super().model_validate(*args, **kwargs)

    @classmethod
    def model_validate_json(cls, *args: Any, **kwargs: Any) -> Self:
        with cls._own_errors():
            return super().model_validate_json(*args, **kwargs)

    @classmethod
    def model_validate_strings(cls, *args: Any, **kwargs: Any) -> Self:
        with cls._own_errors():
            return super().model_validate_strings(*args, **kwargs)

    @classmethod
    @contextmanager
    def _own_errors(cls) -> Iterator[None]:
        try:
            yield
        except ValidationError as error:
            raise cls.error("; ".join(map(cls._describe, error.errors()))) from None

    @classmethod
    def unknown_key(cls, key: str) -> str:
        """Error message for an unknown key."""
        close = difflib.get_close_matches(key.lower(), cls.model_fields, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return f"unknown key {key!r}: {hint}allowed are {', '.join(cls.model_fields)}"

    @classmethod
    def place(cls, location: tuple[int | str, ...]) -> str:
        """How error messages name the location of a nested value."""
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
            # A nested model names only its own keys; a validator's message is complete.
            nested = isinstance(context["error"].__context__, ValidationError)
            return f"{prefix if nested else ''}{context['error']}"
        if kind == "missing":
            return f"{prefix}is missing"
        message, value = problem["msg"][0].lower() + problem["msg"][1:], problem["input"]
        if kind == "union_tag_invalid":
            name = context["discriminator"].strip("'")
            message = f"{name}: input should be one of {context['expected_tags']}"
            value = value[name]
        return f"{prefix}{message} (got {short_repr(value)})"


def parse_yaml(text: str, place: str, error: type[AgentSDError]) -> Any:
    """Parse YAML text into plain values; nothing in it is executed.

    Args:
        text: The YAML text.
        place: Where the text comes from, for error messages.
        error: Type of the error to raise.

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
    """Plain values as YAML text, one per line."""
    out = StringIO()
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.dump(data, out)
    return out.getvalue()
