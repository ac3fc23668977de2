"""Initial images and LoRAs of a request, and comparisons that are loaded again with them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from app_jobs import KEYS, catalog_of, job
from PIL import Image
from test_adapters import save_lora
from tiny_models import tiny_pipeline, tiny_unet

from agentsd.app.history.restored_settings import restore
from agentsd.app.jobs.job import JobProgress
from agentsd.app.jobs.worker import Finished, Worker
from agentsd.app.requests.catalog import ModelCatalog, model_catalog
from agentsd.app.requests.limits import Limits
from agentsd.app.requests.request_options import named_loras, restored_options, with_options
from agentsd.app.requests.schedule_library import ScheduleLibrary
from agentsd.app.result import compare
from agentsd.app.result.comparisons import Comparisons, SavedComparison
from agentsd.errors import LoadError, SettingsError
from agentsd.models.options import PipelineOptions

pytestmark = pytest.mark.slow


@pytest.fixture
def pipe(tmp_path: Path) -> Any:
    return tiny_pipeline(tmp_path, tiny_unet(sample_size=32))


@pytest.fixture
def catalog(pipe: Any) -> ModelCatalog:
    return catalog_of(pipe)


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
