"""``agentsd tune``: what its parts find on problems with known answers, and whole runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import smallest_unet, tiny_pipeline
from tuning_of_tiny_models import FULL, STEPS, cache, few_candidates

from agentsd import Schedule, inspect_patch, patched, tune
from agentsd.cli import main
from agentsd.errors import GenerationError, MissingPackageError, ScheduleError, SettingsError
from agentsd.generation.conditions import conditions
from agentsd.generation.images import make_image
from agentsd.image_settings import ImageSettings
from agentsd.measured import TunedFor
from agentsd.models.loading import model_fingerprint
from agentsd.tuning import probing, step_errors
from agentsd.tuning.budget import Budget, decibels
from agentsd.tuning.candidates import ATTENTION, CACHES, Segment, schedule_of
from agentsd.tuning.clock import OutOfTime, TuningProgress
from agentsd.tuning.outcome import judge, share_interval
from agentsd.tuning.race import Calibration, Race, RaceEntry
from agentsd.tuning.screening import search
from agentsd.tuning.split import HELD_OUT, MORE, TUNING, split_prompts
from agentsd.tuning.step_costs import Kind, StepCosts, measure_steps
from agentsd.tuning.trajectories import Trajectory, recorded_calls

SMALL = {"height": 64, "width": 64, "num_inference_steps": STEPS, "guidance_scale": 2.0}
PROMPTS = ["red", "blue", "green", "a", "b"]


@pytest.fixture
def pipe(tmp_path: Path) -> Any:
    """One whose UNet has one level, as nothing here depends on its depth."""
    return tiny_pipeline(tmp_path, smallest_unet())


@pytest.fixture
def trajectory(request: pytest.FixtureRequest, pipe: Any) -> Trajectory:
    """A run of a few steps, or of as many as a test asks for."""
    steps = getattr(request, "param", STEPS)
    settings = ImageSettings(prompt="red", **SMALL | {"num_inference_steps": steps})
    with recorded_calls(pipe) as calls:
        make_image(pipe, settings)
    return Trajectory(settings, calls)


@pytest.mark.parametrize(
    ("text", "metric", "bound"),
    [("psnr>=40", "psnr", 40.0), (" SSIM >= 0.98", "ssim", 0.98), ("lpips<=.1", "lpips", 0.1)],
)
def test_budgets_are_read(text: str, metric: str, bound: float) -> None:
    assert Budget.parse(text) == (metric, bound)


@pytest.mark.parametrize(
    "text",
    ["", "psnr", "psnr<=40", "lpips>=0.1", "ssim>=98", "speed>=0.9", "psnr>=4.0.0", "fid<=3"],
)
def test_budgets_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="budget: must be psnr>=DB"):
        Budget.parse(text)


def test_more_decibels_are_closer() -> None:
    for metric, far, close in (("psnr", 30, 40), ("ssim", 0.9, 0.99), ("lpips", 0.1, 0.01)):
        assert decibels(metric, close) == pytest.approx(decibels(metric, far) + 10)


@pytest.mark.parametrize("num_steps", [2, 7, 25, 30, 999])
def test_borders_fall_on_their_steps(num_steps: int) -> None:
    for end in range(1, min(num_steps, 40)):
        schedule = schedule_of((Segment(0, 0, end), Segment(1, 0, num_steps)), num_steps)
        phases = [schedule.phase_at(step, num_steps) for step in (end - 1, end)]
        assert phases == list(schedule.phases)


def test_a_trajectory_is_read_back_as_it_was(trajectory: Trajectory, tmp_path: Path) -> None:
    trajectory.save(tmp_path / "t.pt")
    again = Trajectory.load(tmp_path / "t.pt")
    assert again.settings == trajectory.settings
    assert [call.position for call in again.calls] == [call.position for call in trajectory.calls]
    for one, other in zip(again.calls, trajectory.calls, strict=True):
        assert torch.equal(one.output, other.output)
        assert torch.equal(one.latents, other.latents)


@pytest.mark.slow
@pytest.mark.parametrize(("branch", "order"), [(0, 0), (0, None), (0, 2), (-1, None)])
def test_a_probed_light_step_is_that_of_a_run(
    pipe: Any, trajectory: Trajectory, branch: int, order: int | None
) -> None:
    """Up to its first light step, a run with full attention is the unpatched one."""
    light = 4

    def candidate(order: int | None) -> tuple[Segment, ...]:
        """Each phase begins whole: by the first light step there are enough for any order."""
        each = cache(2, branch, order)
        return Segment(FULL, each, 2), Segment(FULL, each, STEPS)

    with probing.probing(pipe, lambda: None) as probe:
        found = step_errors.StepErrors(probe, trajectory, np.ones(STEPS))
        errors = {each: list(found._step_errors(candidate(each))) for each in (None, 0, 2)}
    with patched(pipe, schedule_of(candidate(order), STEPS)), recorded_calls(pipe) as calls:
        make_image(pipe, trajectory.settings)
    moved = trajectory.guided(calls[light].output) - trajectory.guided(
        trajectory.calls[light].output
    )
    true = np.sort(np.abs(moved.flatten().numpy()))
    assert all(np.all(error == 0) for error in errors[order][:light])
    np.testing.assert_allclose(np.sort(np.abs(errors[order][light])), true, atol=1e-5)
    for other in {None, 0, 2} - {order}:
        wrong = errors[other][light]
        assert not np.allclose(np.sort(np.abs(wrong)), true, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("trajectory", [20], indirect=True)  # enough for an interval of 5
def test_predictions_order_candidates_as_images_do(pipe: Any, trajectory: Trajectory) -> None:
    def draw() -> Any:
        return np.asarray(make_image(pipe, trajectory.settings).image, np.float64) / 255

    reference = draw()
    steps = trajectory.settings.num_inference_steps
    candidates = [(Segment(FULL, cache(n, 0, 0), steps),) for n in (2, 3, 5)]
    weights = step_errors.weights_of_steps(trajectory, pipe, draw, places=3)
    with probing.probing(pipe, lambda: None) as probe:
        errors = step_errors.StepErrors(probe, trajectory, weights)
        predicted = [errors.predict(each) for each in candidates]
    made = []
    for candidate in candidates:
        with patched(pipe, schedule_of(candidate, steps)):
            made.append(float(np.sqrt(np.mean((draw() - reference) ** 2))))
    assert predicted == sorted(predicted)
    assert made == sorted(made)
    assert np.array_equal(draw(), reference)  # nothing is left on the pipeline


def test_a_run_costs_the_sum_of_its_steps(trajectory: Trajectory) -> None:
    full, held = (schedule_of((Segment(FULL, c, STEPS),), STEPS) for c in (0, cache(4, -1, 0)))
    held = held.override(cache_min_steps=0)
    seconds = {
        Kind.of(full.phases[0], whole=True): 2.0,
        Kind.of(held.phases[0], whole=False): 0.25,
    }
    costs = StepCosts(seconds, rest=1.0)
    assert costs.run(None, trajectory) == costs.run(full, trajectory) == 1 + 8 * 2
    assert costs.run(held, trajectory) == 1 + 3 * 2 + 5 * 0.25


def test_each_kind_of_step_is_timed_once(pipe: Any, trajectory: Trajectory) -> None:
    schedules = [
        schedule_of((Segment(FULL, cache(n, 0, 0), 4), Segment(1, cache(2, -1), 8)), STEPS)
        for n in (2, 3)
    ]
    schedules = [schedule.override(cache_min_steps=0) for schedule in schedules]
    seconds = measure_steps(pipe, trajectory, schedules)
    assert len(seconds) == 4
    assert all(each > 0 for each in seconds.values())
    assert Kind.from_json(json.loads(json.dumps(list(seconds)[-1]._asdict()))) in seconds


def test_the_search_finds_the_cheapest_places_to_save() -> None:
    """Steps of the first half must be whole; in the second, light ones cost no likeness."""

    def stretches(candidate: Any) -> Any:
        begin = 0
        for segment in candidate:
            yield segment, range(begin, segment.end)
            begin = segment.end

    def time(candidate: Any) -> float:
        return sum((0.2 if s.cache else 1.0) * len(steps) for s, steps in stretches(candidate)) / 20

    def error(candidate: Any) -> float:
        light = (step for s, steps in stretches(candidate) if s.cache for step in steps)
        return 1e-6 + sum(step < 10 for step in light)

    found = search(20, time, error, rounds=3000)
    best = min(found, key=lambda each: (each.error, each.time))
    assert best.error == 1e-6
    assert best.time == pytest.approx(0.6)
    blind = search(20, time, error, rounds=0)
    assert min(each.time for each in blind if each.error == 1e-6) == 1.0


def test_the_search_ends_with_what_it_has_when_time_is_out() -> None:
    left = iter(range(30))

    def error(_: Any) -> float:
        if next(left, None) is None:
            raise OutOfTime
        return 1.0

    assert search(10, lambda candidate: 0.5, error, rounds=1000)


def racing(budget: str, seed: int = 0) -> tuple[Race, dict[tuple[str, int], float]]:
    """Faster candidates are farther from unpatched, and predicted with an error and an offset."""
    random = np.random.default_rng(seed)
    entries, truth = [], {}
    hard = random.normal(0, 4, TUNING)
    for number in range(60):
        name, likeness = f"{number}", 25 + number / 2 + random.normal(0, 1)
        schedule = schedule_of((Segment(0, 0, STEPS),), STEPS)
        entries.append(
            RaceEntry(name, schedule, 0.2 + number / 100, likeness + 6 + random.normal(0, 2))
        )
        for image in range(TUNING):
            truth[name, image] = likeness + hard[image] + random.normal(0, 0.5)
    race = Race(entries, Budget.parse(budget), TUNING, lambda e, image: truth[e.name, image])
    return race, truth


@pytest.mark.parametrize("seed", range(3))
def test_the_race_finds_the_fastest_that_keeps_to_a_likeness(seed: int) -> None:
    race, truth = racing("psnr>=35", seed)
    race.run_whole(race.entries["40"])
    race.explore(race.entries.values(), 8)
    for hope in (0.0, 1.0, 2.0):
        found = race.winner(race.entries.values(), optimism=hope)
    assert found is not None
    worst = {name: min(truth[name, i] for i in range(TUNING)) for name in race.entries}
    fit = [entry for entry in race.entries.values() if worst[entry.name] >= 35]
    assert race.meets(found)
    assert worst[found.name] >= 35
    assert found.time <= min(entry.time for entry in fit) + 0.03
    made = sum(len(entry.values) for entry in race.entries.values())
    assert made < len(truth) / 4


def test_more_images_show_who_was_lucky() -> None:
    """The fastest keeps to the budget on the first images alone, and one of the rest may fail."""
    likeness = {"lucky": [41.0, 42.0, 20.0, 41.0], "steady": [44.0, 45.0, 44.0, 43.0]}
    schedule = Schedule.preset("fast")
    entries = [
        RaceEntry("lucky", schedule, 0.2, 42.0),
        RaceEntry("steady", schedule, 0.5, 60.0),
    ]
    race = Race(entries, Budget.parse("psnr>=35"), 2, lambda e, i: likeness[e.name][i])
    found = race.winner(entries)
    assert found is not None
    assert found.name == "lucky"
    race.images += 1
    race.make(found, 2)
    assert not race.may_meet(found, 9)
    assert race.may_meet(found, 19)  # of which two may miss it
    found = race.winner(entries)
    assert found is not None
    assert found.name == "steady"
    assert race.best(entries) is found
    assert race.meets(found)
    assert not race.meets(race.entries["lucky"])
    race.images += 1  # of which nothing is known yet
    assert race.best(entries) is found


def test_the_race_finds_the_closest_that_is_fast() -> None:
    race, truth = racing("speed>=2")
    race.explore(race.entries.values(), 8)
    found = race.winner(race.entries.values(), optimism=1.0)
    assert found is not None
    means = {name: np.mean([truth[name, i] for i in range(TUNING)]) for name in race.entries}
    fit = [means[entry.name] for entry in race.entries.values() if entry.time <= 0.5]
    assert found.time <= 0.5
    assert means[found.name] >= max(fit) - 1


def test_where_nothing_keeps_to_the_budget_the_closest_is_found() -> None:
    race, truth = racing("psnr>=90")
    race.explore(race.entries.values(), 8)
    found = race.winner(race.entries.values())
    assert found is not None
    assert not race.meets(found)
    worst = {name: min(truth[name, i] for i in range(TUNING)) for name in race.entries}
    assert worst[found.name] >= max(worst.values()) - 2


def test_the_line_of_predictions() -> None:
    line = Calibration.fit([(x, 0.5 * x + 10.0) for x in (20.0, 30.0, 40.0, 50.0)])
    assert line.at(60) == pytest.approx(40)
    assert Calibration.fit([(30.0, 24.0)]).at(40) == pytest.approx(34)


def test_prompts_to_judge_on_are_held_out() -> None:
    for count in (2, 5, 19, 40):
        images = split_prompts([f"prompt {n}" for n in range(count)], SMALL)
        tuning, held_out, more = ({each.prompt for each in part} for part in images)
        assert not (tuning | more) & held_out
        assert len(tuning | more | held_out) == min(count, TUNING + MORE + HELD_OUT)
        assert list(map(len, images)) == [TUNING, HELD_OUT, MORE]
        settings = [*images.tuning, *images.held_out, *images.more]
        assert len({(each.prompt, each.seed) for each in settings}) == len(settings)
    with pytest.raises(SettingsError, match="at least two different"):
        split_prompts(["one", "one "], SMALL)


def test_the_judgement_counts_and_says_by_how_much() -> None:
    values = [46.0, 44.0, 47.0, 43.5]
    judged = [
        {"unpatched": {"seconds": 2.0}, "tuned": {"seconds": 0.5, "psnr": value}}
        for value in values
    ]
    found = judge(judged, ["a", "b", "c", "d"], "tuned", Budget.parse("psnr>=45"))
    assert (found["met"], found["images"], found["worst"], found["short"]) == (2, 4, 43.5, 1.5)
    assert found["time"].mean == 0.25
    assert found["psnr"].mean == pytest.approx(np.mean(values))
    assert judge(judged, ["a", "b", "c", "d"], "tuned", Budget.parse("speed>=4"))["met"] == 4


def test_the_interval_of_a_share() -> None:
    assert share_interval(10, 10).low == pytest.approx(0.722, abs=1e-3)
    assert share_interval(0, 10).high == pytest.approx(0.278, abs=1e-3)


@pytest.fixture
def tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Tune a tiny pipeline with few images and candidates; its progress is in ``seen``."""
    seen: list[TuningProgress] = []
    pipe = tiny_pipeline(tmp_path, smallest_unet())
    few_candidates(monkeypatch)

    def run(budget: str = "psnr>=30", **more: Any) -> Any:
        given = {"out": tmp_path / "mine.yaml", "minutes": 2, "model": "tiny", "weights": "w"}
        return tune(pipe, budget, PROMPTS, **given | SMALL | more, progress=seen.append)

    run.seen, run.pipe = seen, pipe  # type: ignore[attr-defined]
    return run


@pytest.mark.slow
def test_a_whole_run(tuned: Any, tmp_path: Path) -> None:
    found = tuned()
    assert not any(layer.patched for layer in inspect_patch(tuned.pipe).layers)
    assert not found.stopped
    stages = list(dict.fromkeys(each.stage for each in tuned.seen))
    assert stages[0] == "unpatched images"
    assert stages[-1] == "judging"
    row = found.report["held_out"][found.report["chosen"]]
    assert row["images"] == found.report["images"]["held_out"]
    assert 0 <= row["met"] <= row["images"]
    assert found.schedule == Schedule.load(found.yaml)
    assert found.schedule.tuned_for.model == "tiny"
    text = " ".join(found.yaml.read_text().replace("\n# ", " ").split())
    assert all(line in text for line in found.report["words"])
    assert [each["name"] for each in found.front] == found.report["front"]
    assert "unpatched, tuned and preset" in found.page.read_text() or row["images"] == 0
    with pytest.raises(SettingsError, match="already holds a tuning run"):
        tuned()
    with pytest.raises(SettingsError, match="another num_inference_steps"):
        tuned(num_inference_steps=6, resume=True)
    values = (tmp_path / "mine.tuning" / "values.jsonl").read_text()
    again = tuned("speed>=1.2", resume=True)
    assert (tmp_path / "mine.tuning" / "values.jsonl").read_text().startswith(values)
    assert again.report["budget"] == "speed>=1.2"


@pytest.mark.slow
def test_without_out_no_file_and_no_package_for_reports_is_needed(
    tuned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("matplotlib", "jinja2"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    found = tuned(out=None)
    assert (found.yaml, found.page) == (None, None)
    assert found.report["held_out"]
    assert found.schedule.tuned_for.model == "tiny"
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(MissingPackageError, match="a tuning report needs jinja2"):
        tuned()
    with pytest.raises(SettingsError, match="resume: needs out"):
        tuned(out=None, resume=True)


@pytest.mark.slow
def test_a_stopped_run_keeps_the_best_so_far(tuned: Any) -> None:
    found = tuned(cancelled=lambda: tuned.seen[-1].stage == "candidates")
    assert found.stopped
    assert found.report["held_out"] == {}
    assert "Not judged" in found.words
    assert found.yaml.exists()
    resumed = tuned(resume=True)
    assert resumed.report["held_out"]


@pytest.mark.slow
def test_a_run_that_is_stopped_too_early_has_no_best(tuned: Any, tmp_path: Path) -> None:
    with pytest.raises(GenerationError, match="before any schedule was measured"):
        tuned(cancelled=lambda: True)
    assert not (tmp_path / "mine.yaml").exists()


def test_too_little_time_is_refused(tuned: Any) -> None:
    with pytest.raises(SettingsError, match=r"minutes: an unpatched image takes .* or more"):
        tuned(minutes=0.0001)


@pytest.mark.command("tune")
def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few_candidates(monkeypatch)
    (tmp_path / "model").mkdir()
    tiny_pipeline(tmp_path / "model", smallest_unet()).save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    out = tmp_path / "mine.yaml"
    given = {"--budget": "speed>=1.1", "--prompts": tmp_path / "prompts.txt", "--out": out}
    given |= {"--model": tmp_path / "model", "--device": "cpu", "--num-inference-steps": STEPS}
    given |= {"--height": 64, "--width": 64}
    with pytest.raises(SystemExit, match="0"):
        main(["tune", *(str(part) for pair in given.items() for part in pair), "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["budget"] == "speed>=1.1"
    schedule = Schedule.load(out)
    assert schedule.tuned_for is not None
    assert schedule.tuned_for.num_inference_steps == STEPS


def condition(**changes: Any) -> TunedFor:
    known: dict[str, Any] = {
        "model": "m",
        "weights": "w",
        "scheduler": "DDIMScheduler",
        "num_inference_steps": 25,
        "guidance_scale": 7.5,
        "height": 512,
        "width": 512,
        "device": "GPU",
        "dtype": "float16",
    }
    return TunedFor(**known | changes)


def test_differences_of_conditions() -> None:
    assert condition().differences(condition(model="another name for it")) == []
    assert condition().differences(condition(device="CPU")) == ["device CPU instead of GPU"]
    assert "different weights" in condition().differences(condition(weights="v"))[0]
    assert condition(weights=None).differences(condition(model="n")) == ["model n instead of m"]


def test_a_schedule_keeps_what_it_was_tuned_for_until_it_is_changed() -> None:
    schedule = Schedule.from_dict(
        Schedule.preset("balanced").to_dict() | {"tuned_for": condition().model_dump()}
    )
    assert Schedule.from_yaml(schedule.to_yaml()) == schedule
    assert schedule.tuned_for == condition()
    assert schedule.override(sx=4).tuned_for is None
    assert "tuned_for" not in Schedule.preset("balanced").to_dict()
    with pytest.raises(ScheduleError, match=r"tuned_for: .*colour"):
        Schedule.from_dict(schedule.to_dict() | {"tuned_for": {"colour": "red"}})


@pytest.mark.slow
def test_generate_warns_of_another_model_or_device(
    pipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe.save_pretrained(tmp_path / "model")
    settings = {"num_inference_steps": 2, "guidance_scale": 2.0}
    for device, warns in (("abacus", True), (None, False)):
        model = str(tmp_path / "model")
        now = conditions(pipe, settings, model, model_fingerprint(model))
        then = now.model_copy(update={"device": device or now.device})
        schedule = Schedule.preset("balanced").to_dict() | {"tuned_for": then.model_dump()}
        file = tmp_path / "mine.yaml"
        file.write_text(json.dumps(schedule))
        out = str(tmp_path / f"out-{warns}")
        command = ["generate", "--model", model, "--prompt", "red", "--out", out, "--device", "cpu"]
        given = ["--num-inference-steps", "2", "--guidance-scale", "2", "--schedule", str(file)]
        with pytest.raises(SystemExit, match="0"):
            main([*command, *given])
        err = " ".join(capsys.readouterr().err.split())
        assert ("was tuned for another run" in err) == warns
        assert ("instead of abacus" in err) == warns


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--budget", "psnr<=3"], "budget: must be"),
        (["--prompts", "nowhere.txt"], "nowhere.txt"),
        (["--height", "100"], "multiples of 8"),
        (["--num-inference-steps", "0"], "num_inference_steps"),
        (["--out", "mine.txt"], "must be the name of a .yaml file"),
        (["--model", "nowhere/at/all"], "neither a local folder or file"),
    ],
)
def test_bad_input_of_the_command(
    more: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    given = {"--budget": "psnr>=40", "--prompts": str(file), "--out": str(tmp_path / "m.yaml")}
    command = [part for pair in (given | {more[0]: more[1]}).items() for part in pair]
    with pytest.raises(SystemExit, match="2"):
        main(["tune", *command])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert says in " ".join(captured.err.split())


def test_the_candidates_hold_every_preset_of_keys() -> None:
    """What a preset does can be found by the search, too."""
    for name in ("faithful", "fast", "balanced", "turbo"):
        (phase,) = Schedule.preset(name).phases
        assert any(
            schedule_of((Segment(attention, c, 10),), 10).phases == (phase,)
            for attention in range(len(ATTENTION))
            for c in range(len(CACHES))
        )
