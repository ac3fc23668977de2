"""A schedule as plain values that the editor changes, right or wrong, and as text to copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from io import StringIO
from itertools import chain
from typing import Any

from ruamel.yaml import YAML

from ...errors import ScheduleError
from ...methods import METHODS, BasePhase, Cache, Phase
from ...methods.base import ENDS, nest_cache
from ...patching.patch import DEFAULT_SCHEDULE
from ...schedule import DEFAULT_METHOD, Schedule
from ..requests.schedule_text import read_yaml
from .parameters import CACHE_INTERVAL, parameters


def concise(schedule: Schedule) -> dict[str, Any]:
    """A schedule as plain values, without those that are the default."""
    phases = []
    for phase in schedule.phases:
        values = {"method": phase.method} | _given(phase)
        if phase.cache is not None:
            values["cache"] = _given(phase.cache)
        phases.append({name: values[name] for name in phase.to_dict() if name in values})
    return {"phases": phases} | ({"seed": schedule.seed} if schedule.seed else {})


def _given(model: Phase | Cache) -> dict[str, Any]:
    """Parameters other than the defaults."""
    fields = type(model).model_fields
    return {k: v for k, v in model.to_dict().items() if v != fields[k].default}


def as_python(schedule: Schedule) -> str:
    """Code that patches a pipeline with a schedule."""
    phases = []
    for phase in schedule.phases:
        given = {name: repr(value) for name, value in _given(phase).items()}
        if phase.cache is not None:
            given["cache"] = _call(Cache, {k: repr(v) for k, v in _given(phase.cache).items()})
        phases.append(f"    {_call(type(phase), given)},\n")
    seed = f", seed={schedule.seed}" if schedule.seed else ""
    return (
        "import agentsd\n\n"
        f"phases = [\n{''.join(phases)}]\n"
        f"agentsd.apply_patch(pipe, agentsd.Schedule(phases=phases{seed}))\n"
    )


def _call(kind: type, arguments: Mapping[str, str]) -> str:
    listed = ", ".join(f"{name}={value}" for name, value in arguments.items())
    return f"agentsd.{kind.__name__}({listed})"


def read_phases(text: Any) -> list[dict[str, Any]]:
    """The phases of YAML text, valid or not.

    Raises:
        ScheduleError: If there are none.
    """
    data = read_yaml(text)
    phases = data.get("phases") if isinstance(data, dict) else None
    if not isinstance(phases, list) or not all(isinstance(phase, dict) for phase in phases):
        raise ScheduleError("the YAML has no list of phases; fix it, or choose a preset")
    return phases


def method_of(phase: Mapping[str, Any]) -> type[Phase] | None:
    """The method of a phase; None if there is no such method."""
    name = method_name(phase)
    return METHODS.get(name) if isinstance(name, str) else None


def method_name(phase: Mapping[str, Any]) -> Any:
    """The name of a phase's method, which may be none."""
    return phase.get("method", DEFAULT_METHOD)


def cache_interval(phase: Mapping[str, Any]) -> Any:
    """The interval of a phase's cache, in either spelling; 1 for none."""
    cache = _nested(phase).get("cache")
    return cache.get("interval", 1) if isinstance(cache, Mapping) else 1


def _nested(phase: Mapping[str, Any]) -> dict[str, Any]:
    with suppress(ScheduleError):  # which the schedule's own check shows
        return nest_cache(phase)
    return dict(phase)


def edit_phase(phase: Mapping[str, Any], values: Mapping[str, Any], last: bool) -> dict[str, Any]:
    """A phase with the values of its controls.

    Args:
        phase: The phase before. What has no control stays, if the method reads it.
        values: The method, ``until``, and parameters of the method. An optional number is 0 for
            ``None``.
        last: Whether it is the last phase, which runs to the end.
    """
    end = _end(phase, values, last)
    method = method_of(values)
    if method is None:
        return {**end, "method": values["method"]}
    controls = parameters(method)
    ignored = method.ignored_parameters(values)
    stays = set(method.parameters()) - controls.keys() - ignored
    kept = {name: value for name, value in _nested(phase).items() if name in stays}
    cache = {CACHE_INTERVAL.name: values[CACHE_INTERVAL.name]}
    changes = {
        name: values[name]
        for name, parameter in controls.items()
        if name not in ignored | cache.keys()
        and values[name] != parameter.default
        and not (parameter.optional and not values[name])
    }
    return {**end, "method": values["method"], **changes, **nest_cache(kept | cache)}


def switch_method(
    phase: Mapping[str, Any], values: Mapping[str, Any], last: bool
) -> dict[str, Any]:
    """A phase with another method, at the values of the first preset that has it.

    Args:
        phase: The phase before. What all methods share stays.
        values: The new method, and ``until``.
        last: Whether it is the last phase.
    """
    name, shared = values["method"], BasePhase.model_fields.keys() - {"method", *ENDS}
    presets = (concise(Schedule.preset(preset))["phases"] for preset in Schedule.presets())
    usual: dict[str, Any] = next((one for one in chain(*presets) if one["method"] == name), {})
    start = {key: value for key, value in usual.items() if key not in {*shared, "method", *ENDS}}
    kept = {key: value for key, value in _nested(phase).items() if key in shared}
    return {**_end(phase, values, last), "method": name, **start, **kept}


def _end(phase: Mapping[str, Any], values: Mapping[str, Any], last: bool) -> dict[str, Any]:
    if last:
        return {}
    if "until_step" in phase:
        return {"until_step": phase["until_step"]}
    return {"until": values["until"]}


def remove_phase(phases: list[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    """The phases without one of them; the last of the rest runs to the end."""
    rest = [dict(phase) for i, phase in enumerate(phases) if i != number]
    for name in ("until", "until_step"):
        rest[-1].pop(name, None)
    return rest


def add_phase(phases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The phases with the last one cut in half; the new half has the default schedule's method."""
    *early, last = (dict(phase) for phase in phases)
    start = early[-1].get("until", 0) if early else 0
    start = start if isinstance(start, int | float) else 0
    method = Schedule.preset(DEFAULT_SCHEDULE).phases[-1].method
    return [*early, {"until": round((start + 1) / 2, 2), **last}, {"method": method}]


def with_phases(text: str, phases: Sequence[Mapping[str, Any]]) -> str:
    """YAML text with other phases; comments stay, unless what they belong to goes.

    Args:
        text: As for :func:`read_phases`.
        phases: The same with some changed, one left out, or more at the end.

    Example:
        >>> print(with_phases("phases:\\n- method: keys  # few\\n", [{"method": "keys", "sx": 4}]))
        phases:
        - method: keys  # few
          sx: 4
        <BLANKLINE>
    """
    yaml = YAML()
    yaml.default_flow_style = False
    data = yaml.load(text)
    rows = data["phases"]
    if len(phases) < len(rows):
        changed = (i for i, (old, new) in enumerate(zip(rows, phases, strict=False)) if old != new)
        del rows[next(changed, len(phases))]
    for row, phase in zip(rows, phases, strict=False):
        for name in row.keys() - phase.keys():
            del row[name]
        for place, (name, value) in enumerate(phase.items()):
            if name not in row:
                row.insert(place, name, value)
            elif row[name] != value:
                row[name] = value
    rows.extend(dict(phase) for phase in phases[len(rows) :])
    out = StringIO()
    yaml.dump(data, out)
    return out.getvalue()
