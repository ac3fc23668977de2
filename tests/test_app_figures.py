"""What the page says and draws of speed and closeness: headline, estimates, chart, race."""

from __future__ import annotations

import asyncio
import contextlib
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from test_adapters import save_lora
from tiny_models import patched_layers, tiny_pipeline, tiny_unet

from agentsd.app.controls import examples
from agentsd.app.editor.phase_borders import move_border
from agentsd.app.explain import attention_view
from agentsd.app.history.restored_settings import restore
from agentsd.app.jobs.job import Job, JobProgress
from agentsd.app.jobs.time_estimator import PlannedImage, TimeEstimator, fit_rates
from agentsd.app.jobs.worker import Finished, Worker
from agentsd.app.requests.catalog import ModelCatalog, model_catalog
from agentsd.app.requests.limits import Limits
from agentsd.app.requests.request_options import named_loras, restored_options, with_options
from agentsd.app.requests.schedule_library import ScheduleLibrary
from agentsd.app.requests.uploads import read_uploaded_image
from agentsd.app.result import compare, headline, race, size_chart
from agentsd.app.result.comparisons import Comparisons, SavedComparison
from agentsd.app.result.race_gif import playback_rate, race_gif
from agentsd.app.result.sizes import offered_sizes, size_estimates
from agentsd.errors import LoadError, ScheduleError, SettingsError
from agentsd.generation.a1111 import read_parameters
from agentsd.image_settings import ImageSettings
from agentsd.models.options import PipelineOptions
from agentsd.patching.flops import Flops
from agentsd.schedule import Schedule

ROOT = Path(__file__).parents[1]
KEYS = Schedule(phases=[{"method": "keys", "sx": 4, "sy": 4, "min_tokens": 0}])


@pytest.fixture
def pipe(tmp_path: Path) -> Any:
    return tiny_pipeline(tmp_path, tiny_unet(sample_size=32))


@pytest.fixture
def catalog(pipe: Any) -> ModelCatalog:
    return model_catalog({"tiny": pipe}, Limits(max_images=6, max_steps=50), {"style": "/secret"})


def settings(**changes: Any) -> ImageSettings:
    given: dict[str, Any] = {"prompt": "a", "num_inference_steps": 4, "height": 64, "width": 64}
    return ImageSettings(**given | changes)


def figures(psnr: float | None, slow: float = 44.1, fast: float = 9.5) -> dict[str, Any]:
    names = ("unpatched_nsfw_content_detected", "nsfw_content_detected", "unchanged")
    return {"psnr": psnr, "unpatched_seconds": slow, "seconds": fast} | dict.fromkeys(names)


def job(pipe: Any, *images: PlannedImage) -> Job:
    return Job(lambda _: None, images, TimeEstimator(pipe))


@pytest.mark.parametrize(
    ("psnr", "says"),
    [
        (None, "exactly the same image"),
        (60.0, "visually identical"),
        (45.0, "differences are hard to see"),
        (35.0, "small differences"),
        (20.0, "visible differences"),
    ],
)
def test_the_headline_says_how_much_faster_and_how_close(psnr: Any, says: str) -> None:
    html = headline.draw([figures(psnr)], "agentsd (<b>)")
    for text in ("4.6× faster", "44.1 s → 9.5 s", says, "agentsd (&lt;b&gt;)"):
        assert text in html


def test_several_seeds_are_as_close_as_the_worst_of_them() -> None:
    html = headline.draw([figures(60.0), figures(35.0, 22.0, 9.5), figures(None)], "fast")
    assert "small differences" in html
    assert "mean of 3 seeds" in html
    assert "35.0 to 60.0 dB" in html
    assert "(2.3 to 4.6)" in html


def test_noise_is_no_speed_up() -> None:
    assert headline.speed(1.04) == headline.speed(0.96) == "about as fast"
    assert headline.speed(0.5) == "2.0× slower"


def test_a_schedule_that_changes_nothing_has_no_speed_up() -> None:
    html = headline.draw([figures(None, 1.0, 1.2) | {"unchanged": True}], "fast")
    assert "changes nothing at this size" in html
    assert "slower" not in html
    assert "slower" in headline.draw([figures(None, 1.0, 1.2)], "fast")


def test_rates_come_from_one_comparison_and_predict_other_sizes(pipe: Any) -> None:
    estimator = TimeEstimator(pipe)

    def image(schedule: Schedule | None, scheduler: Any = None, **changes: Any) -> PlannedImage:
        return PlannedImage(pipe, settings(**changes), schedule, scheduler)

    def true(image: PlannedImage) -> float:
        count = estimator._operations(image)
        assert count is not None
        return 3e-9 * count.attention + 1e-9 * count.other

    assert estimator.seconds([image(None)]) is None
    before = estimator.speedup(image(KEYS))
    assert before is not None
    assert before > 1  # of operations, as nothing is measured yet
    for schedule in (None, KEYS):
        estimator.learn(image(schedule), true(image(schedule)) / 2, share=0.5)
    found = size_estimates(estimator, image(KEYS), [(128, 128)])[0]
    side = {"height": 128, "width": 128}
    unpatched, patched = (true(image(schedule, **side)) for schedule in (None, KEYS))
    assert found.unpatched == pytest.approx(unpatched)
    assert found.patched == pytest.approx(patched)
    assert found.speedup == pytest.approx(unpatched / patched)
    once = true(image(None))
    assert estimator.seconds([image(None, guidance_scale=1)]) == pytest.approx(once / 2)
    assert estimator.seconds([image(None), image(None)]) == pytest.approx(2 * once)
    heun = estimator.seconds([image(None, "Heun")])  # calls the UNet twice a step, but for the last
    assert heun == pytest.approx(once * 7 / 4)


def test_a_kind_of_image_that_was_made_takes_as_long_again(pipe: Any) -> None:
    estimator, small = TimeEstimator(pipe), PlannedImage(pipe, settings(), None)
    large = small._replace(settings=settings(height=128, width=128))
    estimator.learn(small, 1.0)
    guess = estimator.seconds([large])
    estimator.learn(large, 100.0)
    assert guess is not None
    assert guess < 50
    assert estimator.seconds([large]) == 100.0
    assert estimator.seconds([small]) == 1.0
    assert estimator.is_warm(large)
    assert not estimator.is_warm(large._replace(schedule=KEYS))


def test_rates_are_never_negative() -> None:
    odd = [(Flops(2e9, 1e9), 1.0), (Flops(1e9, 1e9), 2.0)]  # more work in less time
    rates = fit_rates(odd)
    assert rates is not None
    assert min(rates) > 0
    assert fit_rates([]) is None


def test_sizes_stay_within_the_limit() -> None:
    assert offered_sizes(256, 256, 2**18) == [(128, 128), (256, 256), (384, 384), (512, 512)]
    assert offered_sizes(512, 768, 2**19) == [(256, 384), (512, 768)]


def test_the_chart_has_a_dot_for_each_measured_image(pipe: Any) -> None:
    assert "<svg" not in size_chart.draw([], [])
    done = [size_chart.Measured("tiny", 64, 64, "", 4, 2.0, 1.0)]
    image = PlannedImage(pipe, settings(), KEYS)
    html = size_chart.draw(size_estimates(TimeEstimator(pipe), image, [(64, 64)]), done)
    assert html.count("<circle") == 2
    assert "64 × 64: 2.0×" in html
    assert html.count(",") < 40  # no lines without estimates


def traced(pipe: Any, schedule: Any) -> tuple[race.Trace, Any]:
    trace = race.Trace()
    planned = PlannedImage(pipe, settings(num_inference_steps=3), schedule)
    made = job(pipe, planned).make_shown(pipe, planned.settings, on_step=trace.add)
    return trace, made


def test_a_race_has_each_step_at_its_time_and_ends_in_the_image(pipe: Any) -> None:
    trace, made = traced(pipe, None)
    first, second = race.lanes(
        [("Original", trace, made.image, made.seconds), ("ours", trace, made.image, 0.5)]
    )
    assert len(first.frames) == len(first.seconds) == 3
    assert first.seconds == sorted(first.seconds)
    assert 0 < first.seconds[0] < first.total == made.seconds
    assert np.array_equal(np.asarray(first.frames[-1]), np.asarray(made.image))
    assert not np.array_equal(np.asarray(first.frames[0]), np.asarray(first.frames[1]))
    assert second.total == 0.5
    sheet = race.sheet(first)
    assert sheet.size == (3 * 64, 64)


def test_the_linear_decoder_is_exact_for_a_linear_image() -> None:
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(4, 16, 16))
    pixels = (latents[:3] * 20 + 128).clip(0, 255).transpose(1, 2, 0).round().astype(np.uint8)
    image = Image.fromarray(pixels)
    found = race.LinearDecoder.fit(latents, image).decode(latents)
    assert np.abs(np.asarray(found, float) - pixels).mean() < 1
    other = race.LinearDecoder.fit(rng.normal(size=latents.shape), image).decode(latents)
    assert np.abs(np.asarray(other, float) - pixels).mean() > 5


def test_the_gif_lasts_as_long_as_the_race(pipe: Any) -> None:
    image = Image.new("RGB", (64, 64), "red")
    fast = race.Lane("agentsd", [0.5, 1.0], [image, image])
    slow = race.Lane("Original", [2.0, 4.0], [image, image])
    with Image.open(BytesIO(race_gif([fast, slow], "a" * 500))) as found:
        times = []
        for frame in range(found.n_frames):
            found.seek(frame)
            times.append(found.info["duration"])
    assert sum(times[:-1]) == pytest.approx(4000, abs=60)
    assert playback_rate(4.0) == 1
    assert playback_rate(60.0) == 8


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


PARAMETERS = (
    "a fox, (masterpiece:1.2)\nsecond line\nNegative prompt: blurry, low\n"
    'Steps: 20, Sampler: DPM++ 2M, CFG scale: 7.5, Seed: 965400086, Size: 512x768, Model: "a, b", '
    'Lora hashes: "x: 1", Version: v1.9.0'
)


def test_parameters_of_other_programs_are_read(tmp_path: Path) -> None:
    found = read_parameters(PARAMETERS)
    assert found.settings == ImageSettings(
        prompt="a fox, (masterpiece:1.2)\nsecond line",
        negative_prompt="blurry, low",
        seed=965400086,
        num_inference_steps=20,
        guidance_scale=7.5,
        height=768,
        width=512,
    )
    assert (found.scheduler, found.model) == ("DPMSolverMultistepScheduler", "a, b")
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", PARAMETERS)
    Image.new("RGB", (8, 8)).save(tmp_path / "other.png", pnginfo=info)
    assert read_uploaded_image(tmp_path / "other.png") == found


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a fox", "no line with Steps"),
        ("a fox\nSteps: x", "Steps: is not a number"),
        ("a fox\nSteps: 20, Seed: -1", "seed"),
        ("Steps: 20", "must not be blank"),
    ],
)
def test_other_texts_are_refused(text: str, says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        read_parameters(text)


@pytest.mark.parametrize(
    ("field", "found"),
    [
        ('Model: "a, \\"b\\", c"', 'a, "b", c'),
        ("Model: 5 inch, VAE: x", "5 inch"),
        ('Model: 5" disk, VAE: "y"', '5" disk'),
        ('Model: "never closed, VAE: z', "never closed"),
        ("Model:, VAE: z", ""),
        ("nothing, Model: b", "b"),
    ],
)
def test_commas_and_quotes_of_parameters(field: str, found: str) -> None:
    assert read_parameters(f"a fox\nSteps: 20, {field}").model == found


@pytest.mark.parametrize("piece", [" ", '"', '\\"', 'a: "', ":", ",", ", ", '"\\'])
def test_parameters_are_read_in_linear_time(piece: str) -> None:
    """As a picture of a few bytes must not keep a server busy."""

    def seconds(length: int) -> float:
        text = "a fox\nSteps: 20, Seed: a" + piece * (length // len(piece)) + "b"
        times = []
        for _ in range(3):
            start = time.perf_counter()
            with contextlib.suppress(SettingsError):
                read_parameters(text)
            times.append(time.perf_counter() - start)
        return min(times)

    assert seconds(60_000) < 20 * seconds(6_000) + 0.05


@pytest.mark.parametrize("method", ["keys", "agent", "merge"])
def test_what_a_place_listens_to(pipe: Any, catalog: ModelCatalog, method: str) -> None:
    strides = {"sx": 4, "sy": 4} if method != "merge" else {}
    phase = {"method": method, "min_tokens": 0, **strides}
    text = Schedule(phases=[phase | ({"agent_ratio": 0.9375} if method == "agent" else {})])
    request = catalog.request(
        model="tiny", prompt="a", num_inference_steps=4, schedule=text.to_yaml()
    )
    made = attention_view.explain(job(pipe, *compare.planned(pipe, request)), pipe, request)
    assert [seen.step for seen in made.maps] == [1, 2, 3, 4]
    seen = made.maps[0]
    token = seen.token_at(0.99, 0.01)
    assert (token, seen.token_at(1.0, 1.0)) == (31, 32 * 32 - 1)
    weights = seen.weights(token)
    assert weights.sum() == pytest.approx(1, abs=1e-3)
    assert (weights > 0).sum() <= len(set(np.asarray(seen.places).ravel()))
    if method == "agent":
        assert (weights > 0).sum() == 64
    if method == "keys":  # as the layer itself attends
        query = seen.queries[0, token].float()
        scores = (seen.keys[0].float() @ query * seen.scale).softmax(0)
        alone = seen._replace(queries=seen.queries[:1], keys=seen.keys[:1], places=seen.places[:1])
        assert alone.weights(token)[seen.places[0]] == pytest.approx(scores.numpy(), abs=1e-5)
    drawing = attention_view.draw(made.image, seen, token)
    assert drawing.size == attention_view.drawing_size(made.image)
    assert "places" in attention_view.caption(seen, token)
    assert not patched_layers(pipe.unet)
    assert not any(module._forward_pre_hooks for module in pipe.unet.modules())


def test_an_unpatched_layer_has_nothing_to_explain(pipe: Any, catalog: ModelCatalog) -> None:
    request = catalog.request(
        model="tiny", prompt="a", num_inference_steps=1, schedule="phases: [{method: full}]"
    )
    assert (
        attention_view.explain(job(pipe, *compare.planned(pipe, request)), pipe, request).maps == []
    )


def test_what_can_be_added_is_checked(catalog: ModelCatalog, tmp_path: Path) -> None:
    Image.new("RGB", (32, 32), "red").save(tmp_path / "start.png")
    (tmp_path / "text.png").write_text("no image")

    def ask(**given: Any) -> Any:
        return catalog.request(model="tiny", prompt="a", schedule="fast", **given)

    options = ask(init_image=str(tmp_path / "start.png"), strength=0.5).options
    assert options.call_kwargs(64, 64)["image"].size == (64, 64)
    assert ask(lora="style", lora_weight=0.5).options.loras == ("/secret:0.5",)
    assert ask(lora="none").options == ask().options
    for given, says in (
        ({"lora": "/etc"}, "lora: must be one of none, style"),
        ({"lora": "style", "lora_weight": 9}, "lora_weight"),
        ({"init_image": str(tmp_path / "text.png")}, "init_image: not an image"),
        ({"init_image": str(tmp_path / "start.png"), "strength": 0}, "strength"),
        ({"images": 4}, "images: must be 1 to 3"),
        ({"images": 1.5}, "images: must be 1 to 3"),
    ):
        with pytest.raises(SettingsError, match=says) as error:
            ask(**given)
        assert str(tmp_path) not in str(error.value)


def test_a_lora_and_an_initial_image_change_one_request_alone(pipe: Any, tmp_path: Path) -> None:
    lora = save_lora(pipe, tmp_path / "style", "pytorch_lora_weights.safetensors")
    pipe.unload_lora_weights()
    Image.new("RGB", (32, 32), "red").save(tmp_path / "start.png")
    catalog = model_catalog({"tiny": pipe}, Limits(), {"style": lora})

    def make(**options: Any) -> compare.Compared:
        request = catalog.request(
            model="tiny", prompt="a", num_inference_steps=2, schedule=KEYS.to_yaml(), **options
        )
        return compare.compare(job(pipe, *compare.planned(pipe, request)), pipe, request)

    plain = make()
    styled = make(lora="style", lora_weight=2)
    begun = make(init_image=str(tmp_path / "start.png"), strength=0.5)
    again = make()
    images = [one.unpatched.image.tobytes() for one in (plain, styled, begun, again)]
    assert images[0] == images[3]
    assert len({*images}) == 3
    assert styled.records[0].options.loras == ("pytorch_lora_weights.safetensors:2.0",)
    assert begun.records[1].options.init_image == "start.png"
    assert str(tmp_path) not in str([r.to_dict() for r in (*styled.records, *begun.records)])


def test_a_stopped_batch_keeps_its_seeds_and_each_can_be_loaded_again(
    pipe: Any, tmp_path: Path
) -> None:
    Image.new("RGB", (32, 32), "red").save(tmp_path / "mine.png")
    catalog = model_catalog({"tiny": pipe}, Limits())
    worker = Worker({"tiny": pipe})
    comparisons = Comparisons(worker, str(tmp_path / "out"), catalog, ScheduleLibrary())
    request = catalog.request(
        model="tiny",
        prompt="a",
        seed=5,
        images=3,
        num_inference_steps=4,
        schedule="fast",
        init_image=str(tmp_path / "mine.png"),
    )

    async def run() -> list[SavedComparison]:
        async with comparisons.follow(request, "me") as events:
            async for event in events:
                if isinstance(event, Finished):
                    return list(event.result)
                if isinstance(event, JobProgress) and "seed 6" in event.label:
                    worker.stop("me")
        return []

    (made,) = asyncio.run(run())
    worker.close()
    assert made.request.settings.seed == 5
    assert Path(made.patched.file).name == "agentsd-5-fast.png"
    (tmp_path / "mine.png").unlink()
    again = comparisons.load(made.key)
    assert again is not None
    assert again.request.options.init_image is not None
    assert (again.figures, again.pair, again.notes) == (made.figures, made.pair, made.notes)
    restored = restore(again.patched.record, catalog, again.request.options.init_image)
    assert (restored.settings["strength"], restored.notes) == (0.8, [])
    dropped = restore(again.patched.record, catalog)
    assert dropped.settings["init_image"] is None
    assert dropped.notes == ["Not restored: the initial image mine.png."]
    assert comparisons.load("0" * 32) is None


def test_a_lora_comes_back_by_its_file_s_name(catalog: ModelCatalog) -> None:
    record = PipelineOptions(loras=("secret:0.5",))
    found, lost = restored_options(record, catalog.loras)
    assert (found["lora"], found["lora_weight"], lost) == ("style", 0.5, [])
    found, lost = restored_options(PipelineOptions(loras=("other:0.5",)), catalog.loras)
    assert (found["lora"], lost) == ("none", ["the LoRA other"])


def test_loras_have_names_of_their_own() -> None:
    weights = "pytorch_lora_weights.safetensors"
    assert named_loras([f"a/{weights}", f"b/{weights}", "c/d.safetensors", "e"]) == {
        "a": f"a/{weights}",
        "b": f"b/{weights}",
        "d": "c/d.safetensors",
        "e": "e",
    }
    with pytest.raises(SettingsError, match="two LoRAs are called 'a'"):
        named_loras(["x/a.safetensors", "y/a.safetensors"])


def test_a_lora_that_is_broken_leaves_the_pipeline_as_it_was(
    pipe: Any, catalog: ModelCatalog
) -> None:
    request = catalog.request(model="tiny", prompt="a", schedule="fast", lora="style")
    names = list(pipe.unet.state_dict())
    with (
        pytest.raises(LoadError, match="LoRA secret cannot be loaded") as error,
        with_options(pipe, request.options),
    ):
        pass
    assert "/secret" not in str(error.value)
    assert list(pipe.unet.state_dict()) == names


def test_the_page_links_to_the_repository() -> None:
    assert f'Homepage = "{examples.LINKS["Code"]}"' in (ROOT / "pyproject.toml").read_text()


def test_latents_are_kept_whatever_their_type() -> None:
    trace = race.Trace()
    trace.add(0.1, torch.zeros(1, 4, 8, 8, dtype=torch.bfloat16))
    assert trace.latents[0].dtype == np.float64
