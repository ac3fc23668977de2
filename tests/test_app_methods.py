"""A method that nothing in the app knows: the page takes it from the method's own fields."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import gradio as gr
import pytest
import torch
from pydantic import Field
from tiny_models import tiny_pipeline, tiny_unet
from torch import Tensor

from agentsd.app.editor.parameters import parameters
from agentsd.app.editor.phase_controls import PhaseControls
from agentsd.app.editor.phase_edits import cache_interval, concise, edit_phase
from agentsd.app.editor.timeline import Timeline
from agentsd.app.explain import viewer
from agentsd.app.jobs.job import Job
from agentsd.app.jobs.time_estimator import TimeEstimator
from agentsd.app.plots import xy_plot
from agentsd.app.requests.catalog import model_catalog
from agentsd.app.requests.limits import Limits
from agentsd.app.result import compare
from agentsd.methods import METHODS, Phase, Plan
from agentsd.methods.base import ADVANCED, Draw, SelfAttention
from agentsd.schedule import Schedule


@pytest.fixture
def striped() -> Iterator[type[Phase]]:
    """A method whose keys are every n-th token; registered while the test runs."""

    class Striped(Phase):
        summary: ClassVar = "keys are every n-th token"
        replaces: ClassVar = {"most": "every"}

        method: Literal["striped"] = "striped"
        every: Annotated[int, Field(ge=1, le=16, description="Stride of the keys.")] = 4
        most: Annotated[int, Field(ge=1, le=99, description="Most keys.")] | None = None
        gain: Annotated[
            float,
            Field(gt=0, le=4, description="Scale.", examples=[1, 2], json_schema_extra=ADVANCED),
        ] = 1.0
        order: Annotated[Literal["up", "down"], Field(description="Order of the keys.")] = "up"
        flip: Annotated[bool, Field(description="Whether to flip.")] = False
        silent: int = 0

        def plan(self, height: int, width: int) -> Plan:
            tokens = height * width
            return Plan(tokens, tokens, 0, -(-tokens // self.every))

        def choose(self, draw: Draw, heads: int, height: int, width: int) -> Tensor:
            return torch.arange(0, height * width, self.every, device=draw.device)

        def attention(
            self, layer: SelfAttention, x: Tensor, chosen: Tensor, plan: Plan
        ) -> tuple[Tensor, Tensor | None]:
            q, (k, v) = layer.queries(x), layer.keys_and_values(x[:, chosen])
            return layer.output(layer.attend(q, k, v, q.shape[-1] ** -0.5)), None

        def stages(self, plan: Plan) -> tuple[str, ...]:
            return (f"{plan.keys:,} stripes",)

    try:
        yield Striped
    finally:
        del METHODS["striped"]


def test_parameters_are_those_with_a_description(striped: type[Phase]) -> None:
    found = parameters(striped)
    assert list(found) == ["every", "most", "gain", "order", "flip", "cache_interval"]
    every, most, gain, order, flip, _ = found.values()
    assert (every.minimum, every.maximum, every.step, every.default) == (1, 16, 1, 4)
    assert (most.type, most.optional, most.default) == (int, True, None)
    assert (gain.minimum, gain.maximum, gain.advanced) == (gain.step, 4, True)
    assert (order.choices, flip.type) == (("up", "down"), bool)


def test_the_sliders_of_the_known_methods() -> None:
    """Every default is on a step of its slider, and methods share the controls they agree in."""
    for method in METHODS.values():
        for found in parameters(method).values():
            if found.type is float:
                steps = (found.default - found.minimum) / found.step
                assert abs(steps - round(steps)) < 1e-6, found
    agent, keys = (parameters(METHODS[name]) for name in ("agent", "keys"))
    assert agent["sx"].control == keys["sx"].control
    assert agent["sx"].control != agent["sy"].control


def test_the_editor_offers_it(striped: type[Phase]) -> None:
    with gr.Blocks() as page:
        row = PhaseControls(0)
    blocks = {getattr(block, "label", None): block for block in page.blocks.values()}
    method = blocks["Phase 1: method"]
    assert ("striped: keys are every n-th token", "striped") in method.choices
    every, gain, most = blocks["every"], blocks["gain"], blocks["most"]
    assert isinstance(every, gr.Slider)
    assert (every.minimum, every.maximum, every.value) == (1, 16, 4)
    assert (gain.maximum, gain.info) == (4, "Scale.")
    assert isinstance(most, gr.Number)
    assert (blocks["order"].choices, blocks["flip"].value) == (
        [("up", "up"), ("down", "down")],
        False,
    )
    assert "silent" not in blocks

    def visible(phase: dict[str, Any]) -> set[str]:
        updates = row.update(phase, last=True)
        shown = [block for block, new in updates.items() if new.get("visible")]
        return {getattr(block, "label", None) for block in shown}

    names = {"every", "most", "gain", "order", "flip"}
    assert names <= visible({"method": "striped"})
    assert names - visible({"method": "striped", "most": 5}) == {"every"}  # which it replaces
    assert not names & visible({"method": "agent"})
    updates = row.update({"method": "striped", "every": 8, "flip": "no"}, last=True)
    assert updates[every]["value"] == 8
    assert "value" not in updates[blocks["flip"]]  # which it cannot show
    given = tuple(control.value for control in row.inputs)
    values = row.values(("striped", *given[1:])) | {"every": 8, "gain": 2.0}
    assert edit_phase({"method": "striped", "silent": 3}, values, last=True) == {
        "method": "striped",
        "every": 8,
        "gain": 2.0,
        "silent": 3,
    }


def test_the_timeline_and_plots_show_it(striped: type[Phase], tmp_path: Path) -> None:
    pipe = tiny_pipeline(tmp_path, tiny_unet(sample_size=32))
    schedule = Schedule(phases=[{"method": "full", "until": 0.5}, {"method": "striped"}])
    assert concise(schedule)["phases"][1] == {"method": "striped"}
    html = Timeline(pipe).draw(schedule, 10, 64, 64)
    assert "2: striped" in html
    assert "1,024 → 256 stripes" in html
    colours = {part.split('"')[0] for part in html.split("background:")[1:]}
    assert len(colours) == 2
    axes = xy_plot.axes()
    assert (axes["every"].example, axes["gain"].example) == ("4", "1, 2")
    assert axes["order"].example == "up, down"
    catalog = model_catalog({"tiny": pipe}, Limits())
    request = catalog.request(
        model="tiny",
        schedule="phases:\n- method: striped\n",
        prompt="a",
        num_inference_steps=2,
    )
    plot = xy_plot.plan(catalog, request, ("every", "2, 8"), ("seed", "1"))
    assert [cell.schedule and cell.schedule.phases[0].every for cell in plot.cells] == [2, 8]
    job = Job([].append, compare.planned(pipe, request), TimeEstimator(pipe))
    recording = viewer.record_layers(job, pipe, request)
    snapshot = recording.snapshots[1, recording.layers[0]]
    for view in viewer.VIEWS:  # it observes nothing of itself, and nothing is drawn
        assert viewer.caption(snapshot, view).startswith("No ")
        assert viewer.draw(recording, snapshot, view).size == (768, 768)


def test_a_phase_keeps_an_end_that_has_no_control() -> None:
    values = {"method": "full", "until": 0.5, "cache_interval": 1}
    phase = {"method": "merge", "until_step": 5}
    assert edit_phase(phase, values, last=False) == {"until_step": 5, "method": "full"}
    assert edit_phase(phase, values, last=True) == {"method": "full"}
    odd = {"method": "nothing", "until": 0.5}
    assert edit_phase(phase | {"method": ["x"]}, odd, last=True) == {"method": "nothing"}


@pytest.mark.parametrize(
    "cache", [{"cache": {"interval": 3, "order": 2}}, {"cache_interval": 3, "cache_order": 2}]
)
def test_a_phase_keeps_its_cache_in_either_spelling(cache: dict[str, Any]) -> None:
    phase = {"method": "full", **cache}
    assert cache_interval(phase) == 3
    values = {"method": "full", "until": 0.5, "cache_interval": 2}
    changed = {"method": "full", "cache": {"interval": 2, "order": 2}}
    assert edit_phase(phase, values, last=True) == changed
    assert edit_phase(phase, values | {"cache_interval": 1}, last=True) == {"method": "full"}
