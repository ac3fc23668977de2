"""Options shared by several commands, and groups of options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Device = Annotated[
    str | None, typer.Option(help="cuda, mps, cpu, …", show_default="the best available")
]

CacheFolder = Annotated[
    Path | None,
    typer.Option("--cache", help="Folder of the feature cache.", show_default="~/.cache/agentsd"),
]

Dtype = Annotated[
    Literal["float32", "float16", "bfloat16"] | None,
    typer.Option(help="Floating-point type.", show_default="float32 on the CPU, else float16"),
]

DEFAULT_SCHEDULE = "faithful"
"""The default of :func:`agentsd.apply_patch`, repeated because importing it loads torch."""


def with_option_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command take options in groups.

    typer sees a parameter annotated with a dataclass as one option per field; the command receives
    an instance.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: kind for name, kind in hints.items() if is_dataclass(kind)}
    options: list[Parameter] = []
    for name, parameter in signature(command).parameters.items():
        if name in groups:
            options += _options_of(groups[name])
        else:
            keyword = Parameter.KEYWORD_ONLY
            options.append(parameter.replace(kind=keyword, annotation=hints[name]))

    @wraps(command)
    def call(**given: Any) -> None:
        for name, group in groups.items():
            members = {field.name: given.pop(field.name) for field in fields(group)}
            given[name] = group(**members)
        command(**given)

    call.__signature__ = Signature(options)  # type: ignore[attr-defined]
    call.__annotations__ = {option.name: option.annotation for option in options}
    return call


def _options_of(group: Any) -> list[Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        Parameter(
            field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in fields(group)
    ]


def named_options(context: typer.Context) -> set[str]:
    """The parameters that the command line itself sets."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source and source.name == "COMMANDLINE"}


def spelled(names: set[str], context: typer.Context) -> str:
    """Parameters as the command line spells them: ``--height, --width``."""
    return ", ".join(sorted(p.opts[0] for p in context.command.params if p.name in names))
