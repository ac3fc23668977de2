"""Tuning a schedule on the page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect
from serving import opened, served
from tiny_models import patched_layers, smallest_unet, tiny_pipeline
from tuning_of_tiny_models import STEPS, few_candidates

from agentsd import Schedule
from agentsd.app.editor.phase_edits import concise
from agentsd.app.jobs.job import Job, JobProgress, JobStopped
from agentsd.app.jobs.time_estimator import TimeEstimator
from agentsd.app.requests.catalog import ImageRequest, model_catalog
from agentsd.app.requests.limits import Limits
from agentsd.app.server import Server
from agentsd.app.tune.tune_job import TuneRequest, checked_prompts, run_tuning
from agentsd.errors import SettingsError
from agentsd.settings import dump_yaml

SLOW = 60_000
"""Milliseconds to wait for a tuning run on a busy machine."""

PROMPTS = ["red", "blue", "green", "a"]


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    few_candidates(monkeypatch)


@pytest.fixture
def pipe(tmp_path: Path) -> Any:
    folder = tmp_path / "model"
    folder.mkdir()
    return tiny_pipeline(folder, smallest_unet())


def wanted(pipe: Any, scheduler: str | None = None) -> TuneRequest:
    image = model_catalog({"tiny": pipe}, Limits()).request(
        model="tiny",
        schedule="fast",
        prompt="-",
        scheduler=scheduler,
        num_inference_steps=STEPS,
        height=64,
        width=64,
    )
    return TuneRequest(image, "psnr>=30", PROMPTS, 2)


def job(pipe: Any, report: Any = lambda _: None) -> Job:
    return Job(report, (), TimeEstimator(pipe), seconds=120)


@pytest.mark.slow
def test_a_job_keeps_schedule_report_and_plot(pipe: Any, tmp_path: Path) -> None:
    seen: list[JobProgress] = []
    work = job(pipe, seen.append)
    assert work.seconds_left == 120
    work.begin()
    found = run_tuning(work, pipe, wanted(pipe, "Euler"), str(tmp_path / "files"))
    (folder,) = (tmp_path / "files").iterdir()
    names = ["front.png", "tuned.yaml", "tuning-report.html"]
    assert sorted(file.name for file in folder.iterdir()) == names
    schedule = Schedule.load(found.schedule_file)
    assert schedule.tuned_for is not None
    assert schedule.tuned_for.scheduler == "EulerDiscreteScheduler"
    assert schedule.tuned_for.num_inference_steps == STEPS
    assert type(pipe.scheduler).__name__ != "EulerDiscreteScheduler"
    assert not patched_layers(pipe.unet)
    assert seen[0].label.startswith("Tuning, unpatched images")
    shares = [each.share for each in seen]
    assert shares == sorted(shares)
    assert 0 <= shares[0] < shares[-1] <= 1


def test_a_stop_ends_it_within_a_step(pipe: Any, tmp_path: Path) -> None:
    work, steps = job(pipe), 0
    forward = pipe.unet.forward

    def count(*args: Any, **more: Any) -> Any:
        nonlocal steps
        steps += 1
        work.stop()
        return forward(*args, **more)

    work.begin()
    pipe.unet.forward = count
    with pytest.raises(JobStopped):
        run_tuning(work, pipe, wanted(pipe), str(tmp_path))
    assert steps == 1


@pytest.mark.slow
def test_a_stopped_job_keeps_the_best_so_far(pipe: Any, tmp_path: Path) -> None:
    def stop_at_best(progress: JobProgress) -> None:
        if "best so far" in progress.label:
            work.stop()

    work = job(pipe, stop_at_best)
    work.begin()
    found = run_tuning(work, pipe, wanted(pipe), str(tmp_path / "files"))
    assert "Tuning was stopped early." in found.words
    assert Schedule.load(found.schedule_file).phases


@pytest.mark.parametrize("minutes", [0, -1, 10.5, None, "5"])
def test_time_is_limited(minutes: Any) -> None:
    with pytest.raises(SettingsError, match="minutes: must be above 0 and at most 10 here"):
        Limits().check_minutes(minutes)


def test_too_few_prompts_are_refused_before_the_job(pipe: Any) -> None:
    image: ImageRequest = wanted(pipe).image
    with pytest.raises(SettingsError, match="prompts: at least two"):
        checked_prompts("one\n\n one", image)


@pytest.fixture
def server(pipe: Any, tmp_path: Path) -> Iterator[Server]:
    with served(tmp_path / "server", more={"smallest": pipe}) as server:
        yield server


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Page]:
    with opened(browser, server.url) as page:
        page.get_by_role("button", name="Settings: steps").click()
        steps = page.get_by_label("number input for Steps")
        steps.fill(str(STEPS))
        steps.press("Tab")
        page.get_by_role("combobox", name="Model").click()
        page.get_by_role("option", name="smallest").click()
        page.get_by_role("tab", name="Tune").click()
        yield page


@pytest.mark.browser
def test_tune_and_use_it(page: Page, server: Server) -> None:
    status = page.locator("#tune-status")
    expect(page.locator("#use-tuned")).to_be_hidden()
    for name, bad, error in (
        ("budget", "nice", "budget: must be psnr>=DB"),
        ("minutes", "11", "minutes: must be above 0 and at most 10 here"),
        ("tuning-prompts", "one", "prompts: at least two"),
    ):
        control = page.locator(f"#{name}").locator("input, textarea")
        good = control.input_value()
        control.fill(bad)
        control.press("Tab")
        page.locator("#tune").click()
        expect(status).to_contain_text(error)
        control.fill(good)
        control.press("Tab")
    page.locator("#budget").locator("input, textarea").fill("psnr>=30")
    page.locator("#tune").click()
    expect(status.locator("progress")).to_be_visible()
    expect(status).to_contain_text("Chosen for psnr>=30", timeout=SLOW)
    expect(page.locator("#tuned-plot img")).to_be_visible()
    with page.expect_download() as download:
        page.locator("#tuned-yaml").click()
    assert download.value.suggested_filename == "tuned.yaml"
    tuned = Schedule.load(download.value.path())
    assert tuned.tuned_for is not None
    assert tuned.tuned_for.model == "smallest"
    with page.expect_download() as download:
        page.locator("#tuned-report").click()
    assert "Tuned for smallest: psnr&gt;=30" in Path(download.value.path()).read_text()
    page.locator("#use-tuned").click()
    page.get_by_role("tab", name="Schedule", exact=True).click()
    expect(page.locator("#yaml textarea")).to_have_value(dump_yaml(concise(tuned)))
