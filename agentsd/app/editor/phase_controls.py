"""The controls of one phase in the schedule editor, made from the methods' own parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gradio as gr

from ...methods import METHODS
from .parameters import CACHE_INTERVAL, Parameter, parameters
from .phase_edits import cache_interval, method_name, method_of

MIDDLE = 0.5
"""Where ``until`` stands unless a phase says otherwise."""


class PhaseControls:
    """A row of the editor.

    Args:
        number: Of the phase, from 0.
    """

    def __init__(self, number: int) -> None:
        self._parameters = {
            parameter.control: parameter
            for method in METHODS.values()
            for parameter in parameters(method).values()
        }
        usual, advanced = (
            {key: p for key, p in self._parameters.items() if p.advanced is folded}
            for folded in (False, True)
        )
        with gr.Group(visible=False, elem_classes=f"phase phase-{number + 1}") as self.box:
            with gr.Row(equal_height=True):
                self._method = gr.Dropdown(
                    [(f"{name}: {method.summary}", name) for name, method in METHODS.items()],
                    label=f"Phase {number + 1}: method",
                    scale=3,
                    min_width=280,
                )
                self._until = gr.Slider(
                    0.01,
                    1,
                    MIDDLE,
                    step=0.01,
                    label="until",
                    info="The phase ends at this share of the steps.",
                    scale=2,
                )
                self.remove = gr.Button("Remove", size="sm", scale=0, min_width=90)
            with gr.Row():
                self._controls = {key: _control(p) for key, p in usual.items()}
            with gr.Accordion("More settings", open=False) as self._advanced, gr.Row():
                self._controls |= {key: _control(p) for key, p in advanced.items()}

    @property
    def inputs(self) -> list[Any]:
        """The controls."""
        return [self._method, self._until, *self._controls.values()]

    @property
    def outputs(self) -> list[Any]:
        """The components that :meth:`update` changes."""
        return [self.box, self.remove, self._advanced, *self.inputs]

    def values(self, given: tuple[Any, ...]) -> dict[str, Any]:
        """The values of :attr:`inputs` by name: the method, ``until``, and the method's own."""
        method, until, *rest = given
        values = {"method": method, "until": until}
        kind = method_of(values)
        by_control = dict(zip(self._controls, rest, strict=True))
        own = parameters(kind).values() if kind else ()
        return values | {parameter.name: by_control[parameter.control] for parameter in own}

    def update(
        self, phase: Mapping[str, Any] | None, last: bool, values: bool = True, only: bool = False
    ) -> dict[Any, Any]:
        """Updates by component that show a phase, or hide the row for ``None``.

        Args:
            phase: As plain values.
            last: Whether it is the last phase, which has no end.
            values: Whether to set the controls' values, which a visitor may be changing.
            only: Whether it is the only phase, which cannot be removed.
        """
        if phase is None:
            return {self.box: gr.update(visible=False)}
        method = method_of(phase)
        own = {p.control: p for p in parameters(method).values()} if method else {}
        ignored = method.ignored_parameters(phase) if method else set()
        shown = {**phase, CACHE_INTERVAL.name: cache_interval(phase)}
        updates: dict[Any, Any] = {
            self.box: gr.update(visible=True),
            self.remove: gr.update(interactive=not only),
            self._advanced: gr.update(visible=any(p.advanced for p in own.values())),
        }

        def update(control: Any, value: Any, **changes: Any) -> None:
            if values and _fits(control, value):
                changes["value"] = value
            updates[control] = gr.update(**changes)

        update(self._method, method_name(phase))
        has_until = not last and "until_step" not in phase
        update(self._until, phase.get("until", MIDDLE), visible=has_until)
        for key, control in self._controls.items():
            parameter = own.get(key, self._parameters[key])
            update(
                control,
                shown.get(parameter.name, _default(parameter)),
                visible=key in own and parameter.name not in ignored,
                info=_info(parameter),
            )
        return updates


def _default(parameter: Parameter) -> Any:
    return 0 if parameter.optional and parameter.default is None else parameter.default


def _info(parameter: Parameter) -> str:
    return parameter.description + (" 0: not set." if parameter.optional else "")


def _control(parameter: Parameter) -> Any:
    common = {
        "value": _default(parameter),
        "label": parameter.name,
        "info": _info(parameter),
        "min_width": 240,
    }
    if parameter.type is bool:
        return gr.Checkbox(**common)
    if parameter.choices:
        return gr.Dropdown(list(parameter.choices), **common)
    if parameter.type is str:
        return gr.Textbox(**common)
    low, high = parameter.minimum, parameter.maximum
    whole = {"precision": 0} if parameter.type is int else {}
    if parameter.optional or low is None or high is None:
        return gr.Number(minimum=0 if parameter.optional else low, maximum=high, **common, **whole)
    return gr.Slider(low, high, step=parameter.step, **common, **whole)


def _fits(control: Any, value: Any) -> bool:
    """Whether a control can show a value, which YAML may give any type."""
    if isinstance(control, gr.Dropdown):
        return value in [choice for _, choice in control.choices]
    if isinstance(control, gr.Checkbox):
        return isinstance(value, bool)
    if isinstance(control, gr.Textbox):
        return isinstance(value, str)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    low, high = control.minimum, control.maximum
    return (low is None or low <= value) and (high is None or value <= high)
