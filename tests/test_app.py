"""The web demo's parts, without a server: schedules, timelines, plots, recordings."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from tiny_models import patched_layers, smallest_unet, tiny_pipeline

from agentsd.app.components import markup
from agentsd.app.editor import phase_edits
from agentsd.app.editor.parameters import parameters
from agentsd.app.editor.phase_borders import move_border
from agentsd.app.editor.timeline import Timeline, pairs, stages
from agentsd.app.explain import viewer
from agentsd.app.history.restored_settings import restore
from agentsd.app.jobs.job import Job, JobProgress, JobStopped
from agentsd.app.jobs.time_estimator import PlannedImage, TimeEstimator
from agentsd.app.jobs.worker import Finished, Worker
from agentsd.app.plots import plot_sheet, xy_plot
from agentsd.app.requests.catalog import ModelCatalog, model_catalog
from agentsd.app.requests.limits import Limits
from agentsd.app.requests.schedule_library import ScheduleLibrary
from agentsd.app.requests.schedule_text import read_schedule
from agentsd.app.requests.uploads import read_uploaded_image
from agentsd.app.result import compare, headline
from agentsd.errors import ScheduleError, SettingsError
from agentsd.generation.image_files import save_image
from agentsd.generation.records import ImageRecord
from agentsd.image_settings import ImageSettings
from agentsd.methods import METHODS, Agent, Full, Keys
from agentsd.methods.observation import attended_most
from agentsd.methods.token_merging import match, owners
from agentsd.patching.patch import patched
from agentsd.schedule import Schedule


@pytest.fixture
def pipe(tmp_path: Path) -> Any:
    return tiny_pipeline(tmp_path, smallest_unet(sample_size=32))


@pytest.fixture
def catalog(pipe: Any) -> ModelCatalog:
    return model_catalog({"tiny": pipe}, Limits(max_images=6, max_steps=50))


def job(pipe: Any, images: Sequence[PlannedImage], events: list[Any] | None = None) -> Job:
    return Job((events if events is not None else []).append, images, TimeEstimator(pipe))


def test_a_request_has_the_defaults_of_its_model(catalog: ModelCatalog) -> None:
    plain = catalog.request(model="tiny", schedule="faithful", prompt="a")
    assert (plain.settings.height, plain.settings.width) == (64, 64)
    assert plain.settings.guidance_scale == 7.5
    assert plain.schedule == Schedule.preset("faithful")
    assert "DDIM" in catalog.schedulers["tiny"]


def test_any_text_is_read_quickly() -> None:
    bomb = "a: &a {x: 1}\n" + "".join(f"b{i}: &b{i} {{<<: [*a, *a]}}\n" for i in range(500))
    for text in (
        "[" * 16_000,
        "{a: " * 4_000,
        "- " * 8_000,
        "? " * 8_000,
        bomb,
        '"' + "\\" * 9_000,
    ):
        begun = time.perf_counter()
        with pytest.raises(ScheduleError):
            read_schedule(text)
        assert time.perf_counter() - begun < 3


def test_uploads_are_checked_before_they_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.gif").write_bytes(b"GIF89a" + b"\0" * 100)
    Image.new("1", (10_000, 10_000)).save(tmp_path / "vast.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    large = PngImagePlugin.PngInfo()
    large.add_text("agentsd", "[" * 100_000)
    Image.new("RGB", (8, 8)).save(tmp_path / "deep.png", pnginfo=large)
    for name, says in (
        ("a.gif", "not a PNG image"),
        ("vast.png", "pixels"),
        ("plain.png", "no agentsd metadata"),
        ("deep.png", "no agentsd metadata"),
    ):
        with pytest.raises(SettingsError, match=says):
            read_uploaded_image(tmp_path / name)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"schedule": {"phases": []}}, "one or more phases"),
        ({"seed": "x"}, "seed"),
        ({"height": 65}, "multiples of 8"),
        ({"prompt": "\x00"}, "control characters"),
    ],
)
def test_a_forged_record_is_refused(
    pipe: Any, catalog: ModelCatalog, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    request = catalog.request(model="tiny", schedule="faithful", prompt="a", seed=4)
    record = compare.recorded(pipe, request, request.schedule)
    found = restore(record, catalog)
    assert found.settings.items() >= request.settings.model_dump().items()
    assert found.model == "tiny"
    assert found.schedule.is_equivalent_to(request.schedule)
    save_image(Image.new("RGB", (8, 8)), tmp_path / "forged.png", replace(record, model="/etc"))
    assert restore(read_uploaded_image(tmp_path / "forged.png"), catalog).model is None
    forged = json.loads(json.dumps(record.to_dict())) | changes
    with pytest.raises((SettingsError, ScheduleError), match=says):
        restore(ImageRecord.from_dict(forged), catalog)


def test_messages_are_escaped() -> None:
    evil = "<script>alert(1)</script>"
    event = JobProgress(evil, 1, 2, 0.5, 3.0, None)
    for html in (markup.progress(event), markup.note(evil), markup.error(evil)):
        assert "<script" not in html
        assert "&lt;script" in html


@pytest.mark.parametrize(
    ("psnr", "flags", "says"),
    [
        (None, (None, None), "the same image"),
        (None, (False, False), "the same image"),
        (None, (True, False), "not measured"),
        (None, (True, True), "not measured"),
        (31.5, (False, False), "31.5 dB"),
    ],
)
def test_a_hidden_image_is_not_the_same(psnr: Any, flags: Any, says: str) -> None:
    found = {"psnr": psnr, "speedup": 1.5, "unpatched_seconds": 3, "seconds": 2, "unchanged": False}
    names = ("unpatched_nsfw_content_detected", "nsfw_content_detected")
    html = headline.draw([found | dict(zip(names, flags, strict=True))], "faithful")
    assert f"<dd>{says}</dd>" in html


def test_a_timeline_shows_the_tokens_and_the_caps(pipe: Any) -> None:
    timeline = Timeline(pipe)
    html = timeline.draw(Schedule.preset("paper"), 50, 64, 64)
    for text in ("steps 1–20", "steps 21–50", "1,024 → 615 → 64 agents", "capped to 0.9375"):
        assert text in html
    ((level,), _) = timeline.levels(Schedule.preset("paper"), 64, 64)
    assert level.plan == Agent(sx=4, sy=4, ratio=0.4, agent_ratio=0.95).plan(32, 32)
    assert not patched_layers(
        pipe.unet
    )  # the timeline patches a copy without weights, not the model


def test_pairs_are_those_of_the_softmaxes() -> None:
    phase = Keys(sx=2, sy=2)
    assert pairs(phase.plan(8, 8)) == 64 * 16
    assert stages(Full().plan(8, 8), Full()) == "64, as unpatched"
    agent = Agent(sx=4, sy=4, ratio=0.25, agent_ratio=1.0).plan(8, 8)
    assert (agent.agents, pairs(agent)) == (4, 2 * 4 * 48)


def test_controls_and_yaml_agree() -> None:
    before = {"until": 0.5, "method": "agent", "sx": 4, "min_tokens": 0, "agent_ratio": 0.9}
    values = {
        name: parameter.default
        for method in METHODS.values()
        for name, parameter in parameters(method).items()
    } | {"method": "keys", "until": 0.3, "sx": 8, "keys": 0, "agents": 0}
    assert phase_edits.edit_phase(before, values, last=False) == {
        "until": 0.3,
        "method": "keys",
        "sx": 8,
        "min_tokens": 0,  # it has no control and stays
    }
    bounded = phase_edits.edit_phase(before, values | {"keys": 64}, last=True)
    assert bounded == {"method": "keys", "keys": 64, "sx": 8, "min_tokens": 0}
    schedule = Schedule.preset("paper")
    again = Schedule.from_dict(phase_edits.concise(schedule))
    assert again.is_equivalent_to(schedule)
    phases = phase_edits.add_phase(phase_edits.concise(schedule)["phases"])
    assert [phase.get("until") for phase in phases] == [0.4, 0.7, None]
    assert Schedule(phases=phases)
    assert Schedule(phases=phase_edits.remove_phase(phases, 2)).phases[-1].method == "merge"


def test_a_plot_is_checked_before_it_is_made(catalog: ModelCatalog) -> None:
    request = catalog.request(model="tiny", schedule="paper", prompt="a", num_inference_steps=2)

    def planned(x: str, xs: str, y: str, ys: str) -> xy_plot.Plot:
        return xy_plot.plan(catalog, request, (x, xs), (y, ys))

    found = planned("ratio", "0.1, 0.2, 0.3", "schedule", "none, paper")
    ratios = [cell.schedule and cell.schedule.phases[0].ratio for cell in found.cells]
    assert ratios == [None, None, None, 0.1, 0.2, 0.3]
    for axes, says in (
        (("seed", "1, 2, 3", "steps", "1, 2, 3"), "at most 6 images"),
        (("seed", "1", "steps", "51"), "at most 50 here"),
        (("seed", "1", "seed", "2"), "two different"),
        (("seed", "", "steps", "1"), "give values"),
        (("nothing", "1", "steps", "1"), "axis: must be one of"),
        (("seed", "1", "scheduler", "Nope"), "scheduler: must be one of"),
        (("seed", "1", "schedule", "/etc/passwd"), "no preset"),
        (("guidance", "nan", "steps", "1"), "guidance_scale"),
        (("ratio", "2", "steps", "1"), "ratio"),
        (("ratio", "0.5", "schedule", "fast"), "no phase of this schedule reads 'ratio'"),
        (("seed", "1" * 600, "steps", "1"), "at most 500 characters"),
    ):
        with pytest.raises((SettingsError, ScheduleError), match=says):
            planned(*axes)


@pytest.mark.slow
def test_a_plot_s_images_are_those_of_its_labels(pipe: Any, catalog: ModelCatalog) -> None:
    request = catalog.request(model="tiny", schedule="paper", prompt="a", num_inference_steps=2)
    plot = xy_plot.plan(catalog, request, ("schedule", "none, fast"), ("seed", "1, 2"))
    colours = ["red", "green", "blue", "black"]
    images = [Image.new("RGB", (64, 64), colour) for colour in colours]
    sheet = plot_sheet.draw(plot, images, ["1 s"] * 4, "a prompt")
    found = [c for _, c in sorted(sheet.getcolors(1 << 16), reverse=True) if c != (255,) * 3][:4]
    assert set(found) == {image.getpixel((0, 0)) for image in images}
    events: list[JobProgress] = []
    planned = [PlannedImage(pipe, *cell) for cell in plot.images]
    plot_sheet.make(job(pipe, planned, events), pipe, plot, "a")
    assert [p.label.partition(" as ")[0] for p in events[:2]] == ["Warm-up,"] * 2
    assert [(p.label, p.step) for p in events[2:5]] == [
        *(("image 1 of 4", 1), ("image 1 of 4", 2), ("image 2 of 4", 1))
    ]
    assert events[-1].share == 1


@pytest.mark.slow
def test_a_recording_is_what_the_layers_do(pipe: Any, catalog: ModelCatalog) -> None:
    """Owners and agents are those of the layer's own matching, and watching changes nothing."""
    request = catalog.request(model="tiny", schedule="paper", prompt="a", num_inference_steps=4)
    planned = compare.planned(pipe, request)
    recording = viewer.record_layers(job(pipe, planned), pipe, request)
    with patched(pipe, "paper"):
        plain = job(pipe, planned).make(pipe, request.settings)
    assert recording.image.tobytes() == plain.image.tobytes()
    assert (recording.steps, len(recording.layers)) == ([1, 2, 3, 4], 3)
    early = recording.snapshots[1, recording.layers[0]]
    assert early.owner is not None
    assert early.target is not None
    assert early.attended is not None
    assert early.places is not None
    assert (len(np.unique(early.owner)), len(np.unique(early.target))) == (615, 64)
    assert (
        early.target[early.places] == np.arange(64)
    ).all()  # each agent is at a token of its own
    assert set(early.attended) <= set(range(64))
    assert recording.snapshots[4, recording.layers[0]].target is None  # merging alone, by then
    assert not pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1._forward_pre_hooks
    for view in viewer.VIEWS:
        assert viewer.draw(recording, early, view).size == (768, 768)


def test_attended_most_by_a_loop() -> None:
    random = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, n, 8, generator=random) for n in (9, 5))
    best = attended_most(q[0], k[0], 0.5)
    for i in range(9):
        weights = sum(torch.softmax(0.5 * k[0, h] @ q[0, h, i], dim=0) for h in range(2))
        assert best[i] == int(weights.argmax())
    x = torch.randn(1, 16, 4, generator=random)
    owner = owners(match(x, torch.arange(0, 16, 4)), 12)[0]
    assert owner.max() == 3  # destinations come first among the agents


def follow(
    worker: Worker, work: Any, images: Sequence[PlannedImage], leave_after: int | None = None
) -> list[Any]:
    async def run() -> list[Any]:
        found: list[Any] = []
        async with worker.follow(work, images) as events:
            async for event in events:
                found.append(event)
                if leave_after is not None and len(found) >= leave_after:
                    break
        return found

    return asyncio.run(run())


def test_a_failed_or_abandoned_job_does_not_affect_the_next(pipe: Any) -> None:
    worker = Worker({"tiny": pipe})
    settings = ImageSettings(prompt="a", num_inference_steps=8, height=64, width=64)
    planned = [PlannedImage(pipe, settings, Schedule.preset("paper"), "Euler a")]
    steps: list[int] = []

    def make(job: Job) -> bytes:
        return job.make(pipe, settings, Schedule.preset("paper"), "Euler a").image.tobytes()

    def fail(job: Job) -> None:
        def raises(*_: Any) -> None:
            raise ZeroDivisionError

        hook = pipe.unet.register_forward_pre_hook(raises)
        try:
            make(job)
        finally:
            hook.remove()

    def count(job: Job) -> bytes:
        hook = pipe.unet.register_forward_hook(lambda *_: steps.append(1))
        try:
            return make(job)
        finally:
            hook.remove()

    first = follow(worker, make, planned)[-1]
    assert isinstance(first, Finished)
    with pytest.raises(ZeroDivisionError):
        follow(worker, fail, planned)
    assert not patched_layers(pipe.unet)
    follow(worker, count, planned, leave_after=2)
    while worker.waiting:
        time.sleep(0.01)
    assert len(steps) <= 4  # two, and one or two that were under way when it was left
    assert not patched_layers(pipe.unet)
    assert type(pipe.scheduler).__name__ == "DDIMScheduler"
    assert follow(worker, make, planned)[-1].result == first.result
    worker.close()
    assert not worker.open


@pytest.mark.parametrize("stopped", [True, False])
def test_a_visitor_may_stop_a_job_before_it_is_queued(pipe: Any, stopped: bool) -> None:
    """Counting operations takes a second or more, in which a visitor may change their mind."""
    worker = Worker({"tiny": pipe})
    settings = ImageSettings(prompt="a", num_inference_steps=8, height=64, width=64)
    planned = [PlannedImage(pipe, settings, None)]
    made: list[Job] = []

    async def run() -> None:
        async with worker.follow(made.append, planned, "me") as events:
            worker.stop("me" if stopped else "another")
            async for _ in events:
                pass

    if stopped:
        with pytest.raises(JobStopped):
            asyncio.run(run())
    else:
        asyncio.run(run())
    worker.close()
    assert bool(made) is not stopped


def test_a_stopped_job_makes_nothing(pipe: Any) -> None:
    stopped = job(pipe, [])
    stopped.stop()
    with pytest.raises(JobStopped):
        stopped.make(pipe, ImageSettings(prompt="a", height=64, width=64))


def test_changed_phases_keep_the_comments() -> None:
    text = (
        "# mine\nphases:\n- method: keys  # few\n  sx: 4\n- method: merge  # by halves\nseed: 3\n"
    )
    keys, merge = phase_edits.read_phases(text)
    assert phase_edits.with_phases(text, [keys, merge]) == text
    changed = [{"method": "keys", "until": 0.5, "sx": 8}, merge, {"method": "full"}]
    assert phase_edits.with_phases(text, changed) == (
        "# mine\nphases:\n- method: keys  # few\n  until: 0.5\n  sx: 8\n"
        "- method: merge  # by halves\n- method: full\nseed: 3\n"
    )
    rest = phase_edits.with_phases(text, [merge])
    assert "# few" not in rest
    assert phase_edits.read_phases(rest) == [merge]
    assert "# by halves" in rest


def test_the_library_goes_from_closest_to_fastest(tmp_path: Path) -> None:
    names = ScheduleLibrary().names()
    assert names[0] == "faithful"
    assert names.index("balanced") < names.index("turbo") < names.index("paper")
    (tmp_path / "mine.yaml").write_text(
        "phases: [{method: keys, cache: {interval: 2, order: 2}}]\n"
        "measured: [{time: 0.36, psnr: 40.0, images: 8, model: mine, scheduler: DDIM, "
        "num_inference_steps: 25, guidance_scale: 2}]\n"
    )
    (tmp_path / "fast.yaml").write_text("phases: [{method: keys, sx: 8, sy: 8}]\n")
    library = ScheduleLibrary(tmp_path)
    names = library.names()
    assert names.index("balanced") < names.index("mine") < names.index("turbo")
    assert "fast (tuned)" in names[names.index("paper") :]  # nothing measured: after the rest
    mine = Schedule.from_yaml(library.text("mine"))
    assert library.name_of(mine) == "mine"
    assert library.text("fast") == "fast"
    (tmp_path / "bad.yaml").write_text("phases: [{method: kees}]\n")
    with pytest.raises(ScheduleError, match=r"bad\.yaml"):
        ScheduleLibrary(tmp_path)
    with pytest.raises(ScheduleError, match="not a folder"):
        ScheduleLibrary(tmp_path / "none")


@pytest.mark.parametrize("steps", [2, 3, 7, 25, 30, 100])
def test_a_border_is_after_the_step_that_it_was_moved_to(steps: int) -> None:
    for step in range(1, steps):
        phases = move_border([{"method": "full", "until": 0.4}, {"method": "keys"}], 0, step, steps)
        schedule = Schedule(phases=phases)
        at = [schedule.phase_at(number, steps).method for number in range(steps)]
        assert at.count("full") == step
    counted = move_border([{"method": "full", "until_step": 1}, {"method": "keys"}], 0, 1, steps)
    assert counted[0] == {"method": "full", "until_step": 1}


@pytest.mark.parametrize(("number", "step"), [(1, 2), (-1, 2), (0, 0), (0, 10), (0, 1.5), ("0", 2)])
def test_a_border_that_is_not_there_is_refused(number: Any, step: Any) -> None:
    with pytest.raises(ScheduleError, match="border"):
        move_border([{"method": "full", "until": 0.4}, {"method": "keys"}], number, step, 10)
