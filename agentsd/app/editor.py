"""The schedule editor: phases as rows, the same as YAML, drawn over the steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from pprint import pformat
from typing import Any, NamedTuple

import gradio as gr

from ..errors import AgentSDError, ScheduleError
from ..schedule import METHODS, Schedule
from ..settings import dump_yaml
from ..text_files import decode_text
from . import markup
from .faults import in_place
from .limits import MAX_YAML, read_schedule, read_yaml

ROWS = 4
"""Phases that rows are there for; YAML takes more."""

CUSTOM = "your own"
"""Stands for a schedule that is no preset."""

FIELDS = {name: field for kind in METHODS.values() for name, field in kind.model_fields.items()}
"""The parameters of all methods, with their defaults and what they cost and gain."""

USUAL = {name: field.default for name, field in FIELDS.items()} | {"method": "agent"}

COUNTED = ("agents", "keys")
"""Parameters that bound how many there are; 0, on the page, is no bound."""

WAYS = {name: f"{name}: {kind.summary}" for name, kind in METHODS.items()}


def brief(schedule: Schedule) -> dict[str, Any]:
    """A schedule as plain values, without what is so by default."""
    phases = []
    for phase in schedule.phases:
        every = phase.to_dict()
        said = {name: v for name, v in every.items() if name == "method" or v != USUAL[name]}
        phases.append(said)
    return {"phases": phases} | ({"seed": schedule.seed} if schedule.seed else {})


def as_python(schedule: Schedule) -> str:
    """Code that patches a pipeline with a schedule."""
    phases = pformat(brief(schedule)["phases"], sort_dicts=False, width=60)
    seed = f", seed={schedule.seed}" if schedule.seed else ""
    return (
        "import agentsd\n\n"
        f"phases = {phases}\n"
        f"agentsd.apply_patch(pipe, agentsd.Schedule(phases=phases{seed}))\n"
    )


def phases_of(text: Any) -> list[dict[str, Any]]:
    """The phases that a YAML text tells, right or wrong, to be changed.

    Raises:
        ScheduleError: If there are none.
    """
    data = read_yaml(text)
    phases = data.get("phases") if isinstance(data, dict) else None
    if not isinstance(phases, list) or not all(isinstance(phase, dict) for phase in phases):
        raise ScheduleError("the YAML has no list of phases; mend it, or take a preset")
    return phases


def changed(phase: Mapping[str, Any], values: Mapping[str, Any], last: bool) -> dict[str, Any]:
    """A phase as its row says it is.

    Args:
        phase: As it was. What rows have no control for stays, where the method reads it.
        values: Of the row's controls; 0 agents or keys is as many as there are cells.
        last: Whether it runs to the end.
    """
    method = values["method"] if values["method"] in METHODS else "full"
    reads = METHODS[method].parameters()
    replaced = {"agent_ratio"} if method == "agent" and values.get("agents") else set()
    kept = {name: v for name, v in phase.items() if name in reads and name not in values}
    said = {
        name: values[name]
        for name in reads
        if name in values
        and name not in replaced
        and values[name] != USUAL[name]
        and (values[name] or name not in COUNTED)
    }
    end = {} if last else {"until": values["until"]}
    return {**end, "method": method, **said, **kept}


def without(phases: list[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    """The phases without one; the last one runs to the end."""
    rest = [dict(phase) for i, phase in enumerate(phases) if i != number]
    for name in ("until", "until_step"):
        rest[-1].pop(name, None)
    return rest


def with_one_more(phases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The phases with the last one halved: its first half as it was, then keys."""
    *early, last = (dict(phase) for phase in phases)
    begun = early[-1].get("until", 0) if early else 0
    begun = begun if isinstance(begun, int | float) else 0
    return [*early, {"until": round((begun + 1) / 2, 2), **last}, {"method": "keys"}]


class Row(NamedTuple):
    """The controls of a phase."""

    box: Any
    controls: dict[str, Any]
    more: Any
    remove: Any

    def shown(
        self, phase: Mapping[str, Any] | None, last: bool, values: bool = True
    ) -> dict[Any, Any]:
        """What to show for a phase as plain values; nothing for ``None``.

        Without ``values`` the controls keep theirs, which somebody may be moving on.
        """
        if phase is None:
            return {self.box: gr.update(visible=False)}
        method = phase.get("method", USUAL["method"])
        reads = METHODS[method].parameters() if method in METHODS else ()
        told: dict[Any, Any] = {
            self.box: gr.update(visible=True),
            self.more: gr.update(visible=method != "full"),
        }
        for name, control in self.controls.items():
            seen = name in reads or name == "method" or (name == "until" and not last)
            if name == "agent_ratio" and phase.get("agents"):
                seen = False
            usual = {"until": 0.5, "agents": 0, "keys": 0}.get(name, USUAL[name])
            value = phase.get(name, usual)
            given = {"value": value} if values and _fits(control, value) else {}
            told[control] = gr.update(visible=seen, **given)
        return told


def _fits(control: Any, value: Any) -> bool:
    """Whether a control can show a value, which YAML may have of any kind."""
    if isinstance(control, gr.Dropdown):
        return value in [choice for _, choice in control.choices]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    low, high = control.minimum, control.maximum
    return (low is None or low <= value) and (high is None or value <= high)


class Editor(NamedTuple):
    """The editor's parts that others need."""

    yaml: Any
    drawn: Any
    everything: list[Any]
    """Components that a newly loaded schedule changes."""
    load: Callable[..., dict[Any, Any]]
    """``(yaml, model, steps, height, width)`` to what to show of it."""


def build(preset: Any, about: list[Any], draw: Callable[..., str]) -> Editor:
    """Put the editor on the page.

    Args:
        preset: The choice of a preset, which is told of changes.
        about: The controls for model, steps, height and width.
        draw: ``(schedule, model, steps, height, width)`` to HTML.
    """
    drawn = gr.HTML(elem_id="timeline")
    rows = [_row(number) for number in range(ROWS)]
    with gr.Row():
        add = gr.Button("Add a phase", size="sm", elem_id="add-phase")
        upload = gr.UploadButton(
            "Upload YAML", file_types=[".yaml", ".yml"], type="filepath", size="sm"
        )
        download = gr.Button("Download YAML", size="sm")
    with gr.Row():
        yaml = gr.Textbox(
            label="The same as YAML, which says more than the rows",
            elem_id="yaml",
            min_width=320,
            lines=12,
            max_length=MAX_YAML,
            html_attributes=gr.InputHTMLAttributes(spellcheck=False),
        )
        python = gr.Textbox(
            label="Copy as Python",
            elem_id="python",
            min_width=320,
            lines=12,
            max_lines=12,
            interactive=False,
            buttons=["copy"],
        )
    # Text boxes tell no pasting or deleting as input, so that every change must be looked at, and
    # those known that come from here.
    ours = gr.State("")
    everything = [
        *(yaml, ours, drawn, python, preset),
        *(c for row in rows for c in (row.box, row.more, *row.controls.values())),
    ]

    shows = in_place(drawn)

    @shows
    def view(text: str, *about: Any) -> dict[Any, Any]:
        """What a schedule's text looks like: its timeline, or what is wrong with it."""
        try:
            schedule = read_schedule(text)
            found: dict[Any, Any] = {
                drawn: draw(schedule, *about),
                python: as_python(schedule),
            }
        except AgentSDError as error:
            return {drawn: markup.wrong(str(error)), python: "", preset: CUSTOM}
        same = [n for n in Schedule.presets() if Schedule.preset(n).to_dict() == schedule.to_dict()]
        return found | {preset: same[0] if same else CUSTOM}

    def show(phases: list[dict[str, Any]], values: bool = True) -> dict[Any, Any]:
        """The rows of phases; none where there are too many for rows."""
        count = len(phases) if len(phases) <= ROWS else 0
        told: dict[Any, Any] = {}
        for number, row in enumerate(rows):
            phase = phases[number] if number < count else None
            told |= row.shown(phase, number == count - 1, values)
        return told

    @shows
    def typed(text: str, known: str, *about: Any) -> dict[Any, Any]:
        """Text was typed: it is left as it is."""
        if text == known:
            return {drawn: gr.skip()}
        try:
            phases = phases_of(text)
        except ScheduleError:
            return view(text, *about)
        return view(text, *about) | show(phases)

    @shows
    def load(text: str, *about: Any) -> dict[Any, Any]:
        """Text comes from elsewhere: a preset's name, a file, an image."""
        schedule = read_schedule(text)
        data = brief(schedule)
        new = dump_yaml(data)
        return {yaml: new, ours: new} | view(new, *about) | show(data["phases"])

    def rewritten(text: str, phases: list[dict[str, Any]], *about: Any) -> dict[Any, Any]:
        rest = {k: v for k, v in read_yaml(text).items() if k != "phases"}
        new = dump_yaml({"phases": phases, **rest})
        return {yaml: new, ours: new} | view(new, *about)

    def edited(number: int) -> Callable[..., dict[Any, Any]]:
        @shows
        def edit(text: str, *values: Any) -> dict[Any, Any]:
            phases = phases_of(text)
            about, of_row = values[:4], values[4:]
            if number >= len(phases):
                raise ScheduleError(f"there is no phase {number + 1}")
            last = number == len(phases) - 1
            says = dict(zip(rows[number].controls, of_row, strict=True))
            phases[number] = changed(phases[number], says, last)
            return rewritten(text, phases, *about) | show(phases, values=False)

        return edit

    def removed(number: int) -> Callable[..., dict[Any, Any]]:
        @shows
        def remove(text: str, *about: Any) -> dict[Any, Any]:
            phases = phases_of(text)
            if len(phases) < 2 or number >= len(phases):
                raise ScheduleError("a schedule has at least one phase")
            rest = without(phases, number)
            return rewritten(text, rest, *about) | show(rest)

        return remove

    @shows
    def one_more(text: str, *about: Any) -> dict[Any, Any]:
        phases = phases_of(text)
        if len(phases) >= ROWS:
            raise ScheduleError(f"rows are there for {ROWS} phases; the YAML takes more")
        phases = with_one_more(phases)
        return rewritten(text, phases, *about) | show(phases)

    @shows
    def uploaded(path: str, *about: Any) -> dict[Any, Any]:
        return load(_read(path), *about)

    quick: dict[str, Any] = {
        "queue": False,
        "show_progress": "hidden",
        "api_visibility": "private",
        "outputs": everything,
    }
    yaml.change(typed, [yaml, ours, *about], trigger_mode="always_last", **quick)
    preset.input(
        lambda name, text, *about: load(text if name == CUSTOM else name, *about),
        [preset, yaml, *about],
        **quick,
    )
    add.click(one_more, [yaml, *about], **quick)
    upload.upload(uploaded, [upload, *about], **quick)
    download.click(None, yaml, None, js=_DOWNLOAD, api_visibility="private")
    for number, row in enumerate(rows):
        row.remove.click(removed(number), [yaml, *about], **quick)
        inputs = [yaml, *about, *row.controls.values()]
        for control in row.controls.values():
            control.input(edited(number), inputs, trigger_mode="always_last", **quick)
    for control in about:
        control.change(view, [yaml, *about], trigger_mode="always_last", **quick)
    begun = load(preset.value, *(control.value for control in about))
    for component, value in begun.items():
        changes = value if isinstance(value, dict) else {"value": value}
        for name in changes.keys() & {"value", "visible"}:
            setattr(component, name, changes[name])
    return Editor(yaml, drawn, everything, load)


_DOWNLOAD = """(text) => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], {type: "application/yaml"}));
  link.download = "schedule.yaml";
  link.click();
  URL.revokeObjectURL(link.href);
}"""


def _read(path: str) -> str:
    """The text of a file that a visitor uploaded, which is then no longer needed."""
    file = Path(path)
    try:
        if file.stat().st_size > MAX_YAML:
            raise ScheduleError(f"the YAML may have at most {MAX_YAML:,} bytes")
        return decode_text(file.read_bytes(), "that file", ScheduleError)
    finally:
        file.unlink(missing_ok=True)


def _row(number: int) -> Row:
    controls: dict[str, Any] = {}
    with gr.Group(visible=False, elem_id=f"phase-{number + 1}") as box:
        with gr.Row(equal_height=True):
            controls["method"] = gr.Dropdown(
                [(text, name) for name, text in WAYS.items()],
                label=f"Phase {number + 1}: method",
                scale=3,
                min_width=280,
            )
            controls["until"] = gr.Slider(
                0.01,
                1,
                0.5,
                step=0.01,
                label="until",
                info="Holds before this share of the steps.",
                scale=2,
            )
            remove = gr.Button("Remove", size="sm", scale=0, min_width=90)
        with gr.Row():
            for name, high in (("ratio", 1), ("agent_ratio", 1)):
                controls[name] = _slider(name, 0, high, 0.01)
            for name in ("sx", "sy"):
                controls[name] = _slider(name, 1, 64, 1)
            for name in COUNTED:
                controls[name] = gr.Number(
                    0, precision=0, minimum=0, min_width=240, **_labelled(name)
                )
            controls["select"] = _choice("select", ["cycle", "random", "grid"])
        with gr.Accordion("more of this phase", open=False) as more, gr.Row():
            controls["k_scale2"] = _slider("k_scale2", 0.01, 2, 0.01)
            controls["k_shortcut"] = _slider("k_shortcut", -1, 1, 0.005)
    return Row(box, controls, more, remove)


def _slider(name: str, low: float, high: float, step: float) -> Any:
    whole = {"precision": 0} if step == 1 else {}
    return gr.Slider(
        low,
        high,
        USUAL[name],
        step=step,
        min_width=240,
        **_labelled(name),
        **whole,
    )


def _choice(name: str, choices: list[str]) -> Any:
    return gr.Dropdown(choices, value=USUAL[name], min_width=240, **_labelled(name))


def _labelled(name: str) -> dict[str, Any]:
    return {"label": name, "info": FIELDS[name].description}
