"""The parameters that the page can set, read from the fields of the methods themselves."""

from __future__ import annotations

from functools import cache
from math import floor, log10
from typing import Any, NamedTuple

from ...methods import Phase
from ...methods.base import INTERVAL, MAX_INTERVAL

TYPES = {"integer": int, "number": float, "boolean": bool, "string": str}
"""Types of parameters that there is a control for, by their names in a JSON schema."""


class Parameter(NamedTuple):
    """A parameter of a method."""

    name: str
    type: type
    minimum: float | None
    maximum: float | None
    step: float
    """Between two values of a slider; fine enough for the default."""
    choices: tuple[str, ...]
    optional: bool
    """Whether it may be ``None``."""
    advanced: bool
    description: str
    default: Any
    examples: list[Any]

    @property
    def control(self) -> tuple[Any, ...]:
        """What decides its control; methods whose parameters agree in this share a control."""
        return self[: self._fields.index("description")]


CACHE_INTERVAL = Parameter(
    "cache_interval", int, 1, MAX_INTERVAL, 1, (), False, False, INTERVAL, 1, []
)
"""``interval`` of a phase's cache; 1 for none."""


@cache
def parameters(method: type[Phase]) -> dict[str, Parameter]:
    """The parameters of a method that have a description, by name, and its cache's interval."""
    fields = method.model_json_schema()["properties"]
    own = (_read(name, fields[name]) for name in method.parameters())
    return {one.name: one for one in (*own, CACHE_INTERVAL) if one is not None}


def _read(name: str, field: dict[str, Any]) -> Parameter | None:
    allowed = [kind for kind in field.get("anyOf", [field]) if kind.get("type") != "null"]
    kind = allowed[0]
    field = kind | field  # a type that may be None can have the description inside or outside
    if "description" not in field or len(allowed) > 1 or kind.get("type") not in TYPES:
        return None
    low = kind.get("minimum", kind.get("exclusiveMinimum"))
    high = kind.get("maximum", kind.get("exclusiveMaximum"))
    bounded = kind["type"] == "number" and low is not None and high is not None
    step = _step(low, high, field["default"]) if bounded else 1
    return Parameter(
        name=name,
        type=TYPES[kind["type"]],
        minimum=low + step if "exclusiveMinimum" in kind else low,
        maximum=high - step if "exclusiveMaximum" in kind else high,
        step=step,
        choices=tuple(kind.get("enum", ())),
        optional="anyOf" in field,
        advanced=field.get("advanced", False),
        description=field["description"],
        default=field["default"],
        examples=field.get("examples", []),
    )


def _step(low: float, high: float, default: float | None) -> float:
    """About a hundredth of a range, or half of that if only then the default is on a step."""
    step = 10.0 ** (floor(log10(high - low)) - 2)
    steps = ((low if default is None else default) - low) / step
    return step if abs(steps - round(steps)) < 1e-6 else step / 2
