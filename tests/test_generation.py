"""Settings, images and their records, on a tiny pipeline with random weights."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoPipelineForImage2Image
from PIL import Image
from tiny_models import for_tiny, smallest_unet, tiny_pipeline, with_safety_checker

from agentsd import GenerationError, OutputError, Schedule, SettingsError, inspect_patch
from agentsd.generation.comparison import compare
from agentsd.generation.images import make_batch, make_image
from agentsd.generation.prompt_encoding import PromptEncoder, warnings_for
from agentsd.generation.records import ImageRecord
from agentsd.image_settings import ImageSettings, image_seed, warm_up_settings
from agentsd.similarity import psnr

SCHEDULE = for_tiny("faithful")


@pytest.fixture
def pipe(tmp_path: Path) -> Any:
    """One whose UNet has one level, as nothing here depends on its depth."""
    return tiny_pipeline(tmp_path, smallest_unet())


def settings(**changes: Any) -> ImageSettings:
    return ImageSettings(**{"prompt": "red", "num_inference_steps": 2} | changes)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("prompt", "", "must not be blank"),
        ("prompt", " \n", "must not be blank"),
        ("prompt", "a\0b", "control characters"),
        ("prompt", "a\ud800", "broken Unicode"),
        ("prompt", 3, "valid string"),
        ("negative_prompt", "\x1b[31m", "control characters"),
        ("seed", -1, "greater than or equal to 0"),
        ("seed", 2**63, "less than"),
        ("seed", 1.5, "valid integer"),
        ("num_inference_steps", 0, "greater than or equal to 1"),
        ("num_inference_steps", 1001, "less than or equal to 1000"),
        ("guidance_scale", -0.1, "greater than or equal to 0"),
        ("guidance_scale", float("nan"), "finite"),
        ("height", 0, "greater than or equal to 64"),
        ("width", 100, "multiples of 8"),
        ("width", 10_000, "less than or equal to 8192"),
    ],
)
def test_settings_out_of_range(name: str, value: Any, says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        settings(**{name: value})


def test_an_image_depends_on_its_seed_and_leaves_the_global_one(pipe: Any) -> None:
    before = torch.get_rng_state()
    first, again, other = (make_image(pipe, settings(seed=s)).image for s in (3, 3, 4))
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != other.tobytes()
    assert torch.equal(before, torch.get_rng_state())


def test_seeds_differ_by_prompt_image_and_base() -> None:
    seeds = [image_seed(b, p, i) for b in range(5) for p in range(40) for i in range(10)]
    assert len(set(seeds)) == len(seeds)
    assert max(seeds) < 2**32  # PyTorch's generator reads no more
    assert image_seed(123, 0, 0) == 123


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_embeddings_made_ahead_are_the_pipeline_s_own(pipe: Any, guidance: float) -> None:
    one = settings(prompt="a b", negative_prompt="c", guidance_scale=guidance, height=64, width=64)
    plain = pipe(
        "a b",
        negative_prompt="c",
        guidance_scale=guidance,
        num_inference_steps=2,
        height=64,
        width=64,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    assert make_image(pipe, one).image.tobytes() == plain.tobytes()


def test_a_prompt_is_encoded_once(pipe: Any) -> None:
    calls, forward = [], pipe.text_encoder.forward

    def counted(*args: Any, **more: Any) -> Any:
        calls.append(1)
        return forward(*args, **more)

    pipe.text_encoder.forward = counted
    encode = PromptEncoder(pipe)
    for seed in range(3):
        make_batch(pipe, [settings(seed=seed), settings(seed=seed + 9)], encode)
    assert len(calls) == 2  # the prompt and the empty negative one


def test_noise_does_not_depend_on_the_batch(pipe: Any) -> None:
    """The images of a batch differ from single ones by the kernels' last bits and no more."""
    encode, many = PromptEncoder(pipe), [settings(seed=s, prompt=p) for s, p in enumerate("abc")]
    together = make_batch(pipe, many, encode)
    for alone, image in zip(many, together, strict=True):
        assert abs(make_batch(pipe, [alone], encode)[0].pixels - image.pixels).max() < 1e-5
    other = make_batch(pipe, [settings(seed=9, prompt="a")], encode)[0]
    assert abs(other.pixels - together[0].pixels).max() > 1e-2


def test_compare_writes_images_records_and_a_summary(pipe: Any, tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    summary = compare(pipe, settings(seed=5), out, schedule=SCHEDULE, model="tiny", num_images=2)
    assert summary == json.loads((out / "summary.json").read_text())
    names = {p.name for p in out.iterdir()}
    kinds = ("", "-unpatched", "-compare")
    assert names == {f"0000{i}{k}.png" for i in range(2) for k in kinds} | {"summary.json"}
    assert summary["speedup"] == pytest.approx(
        summary["unpatched_seconds"] / summary["seconds"], abs=1e-3
    )
    for entry, seed in zip(summary["images"], (5, 6), strict=True):
        ours, theirs = (Image.open(out / entry[k]) for k in ("file", "unpatched_file"))
        assert ours.tobytes() != theirs.tobytes()
        assert entry["seed"] == seed
        assert entry["psnr"] == pytest.approx(psnr(ours, theirs))
        assert json.loads(ours.text["agentsd"])["schedule"] == SCHEDULE.to_dict()
        assert json.loads(theirs.text["agentsd"])["schedule"] is None
        assert theirs.tobytes() == make_image(pipe, settings(seed=seed)).image.tobytes()
    assert not any(layer.patched for layer in inspect_patch(pipe).layers)


def test_a_record_is_read_back_whole(pipe: Any) -> None:
    options = {"revision": "1" * 40, "variant": "fp16", "weights": {"tiny": "2" * 64}}
    options |= {"init_image": "a.png", "strength": 0.5, "init_image_sha256": "3" * 64}
    record = ImageRecord.of(pipe, settings(), "tiny", SCHEDULE, options)
    for one in (record, replace(record, schedule=None, size=(8, 16), batch=(1, 4))):
        text = json.dumps(one.to_dict())
        assert ImageRecord.from_dict(json.loads(text)).to_dict() == one.to_dict()
    assert record.to_dict().items() > options.items()
    assert record.fingerprints() == {"tiny": "2" * 64, "a.png": "3" * 64}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"of a later version": [1], "weights": 3}, {"weights": None}),
        ({"batch": [4, 4], "variant": {"baseline": "todo"}}, {"batch": None, "variant": None}),
        ({"height": 33, "width": 17}, {"size": (17, 33), "settings": settings()}),
        ({"height": 64, "width": 72}, {"settings": settings(height=64, width=72)}),
    ],
)
def test_records_of_other_versions_are_read(
    pipe: Any, changes: dict[str, Any], expected: dict[str, Any]
) -> None:
    old = ImageRecord.of(pipe, settings(), "tiny", SCHEDULE).to_dict() | changes
    del old["revision"], old["transformers"]
    found = ImageRecord.from_dict(old)
    assert {name: getattr(found, name) for name in expected} == expected
    assert found.schedule.is_equivalent_to(SCHEDULE)


def test_an_image_compared_with_itself(pipe: Any, tmp_path: Path) -> None:
    full = Schedule.from_dict({"phases": [{"method": "full"}]})
    run = {"schedule": full, "model": "tiny"}
    assert compare(pipe, settings(), tmp_path, **run)["psnr"] is None
    assert "NaN" not in (tmp_path / "summary.json").read_text()


def test_a_hidden_image_is_like_none(pipe: Any, tmp_path: Path) -> None:
    """Black equals black; an image that a checker hid is not the same image for that."""
    with_safety_checker(pipe, lambda number: number in (2, 3, 4))  # 0 and 1 are the warm-ups
    run = {"schedule": SCHEDULE, "model": "tiny", "num_images": 3}
    summary = compare(pipe, settings(), tmp_path, **run)
    flags = ("nsfw_content_detected", "unpatched_nsfw_content_detected")
    hidden = [[image[flag] for flag in flags] for image in summary["images"]]
    assert (sorted(map(sum, hidden)), summary["nsfw_content_detected"]) == ([0, 1, 2], 3)
    assert [image["psnr"] is None for image in summary["images"]] == [any(two) for two in hidden]
    assert summary["psnr"] == summary["images"][2]["psnr"]
    names = ("file", "unpatched_file")
    for image, two in zip(summary["images"], hidden, strict=True):
        black = [not Image.open(tmp_path / image[name]).getbbox() for name in names]
        assert black == two


@pytest.mark.parametrize("strength", [0.4, 0.9, 1e-3])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_warm_up_runs_its_steps_at_any_strength(strength: float, steps: int) -> None:
    call_kwargs = {"strength": strength}
    short = warm_up_settings(settings(num_inference_steps=1000), steps, call_kwargs)
    left = int(short.num_inference_steps * strength)  # as diffusers has it
    assert left == min(steps, int(1000 * strength))
    assert (
        warm_up_settings(settings(num_inference_steps=3), steps, call_kwargs).num_inference_steps
        <= 3
    )


def test_compare_from_an_image(pipe: Any, tmp_path: Path) -> None:
    """The warm-up runs steps, too, where the image to begin from leaves out most of them."""
    pipe = AutoPipelineForImage2Image.from_pipe(pipe)
    call_kwargs = {"image": Image.new("RGB", (32, 32), "red"), "strength": 0.4}
    run = {"schedule": SCHEDULE, "model": "tiny", "call_kwargs": call_kwargs}
    summary = compare(pipe, settings(num_inference_steps=5), tmp_path, **run)
    assert summary["images"][0]["psnr"] > 0


def test_a_run_that_leaves_no_step_is_refused(pipe: Any) -> None:
    pipe = AutoPipelineForImage2Image.from_pipe(pipe)
    call_kwargs = {"image": Image.new("RGB", (32, 32)), "strength": 0.4}
    says = "num_inference_steps: 2 at strength 0.4 leaves no denoising step; ask for at least 3"
    with pytest.raises(SettingsError, match=says):
        make_image(pipe, settings(), call_kwargs=call_kwargs)
    assert make_image(pipe, settings(num_inference_steps=3), call_kwargs=call_kwargs).image
    with pytest.raises(SettingsError, match="denoising step; raise strength"):
        make_image(pipe, settings(), call_kwargs=call_kwargs | {"strength": 1e-9})


def test_psnr_of_a_known_error() -> None:
    """One channel of three off by 51, a fifth of the range: mean squared error 1/75."""
    black, red = (Image.new("RGB", (4, 4), (r, 0, 0)) for r in (0, 51))
    assert psnr(black, red) == pytest.approx(10 * math.log10(75))


def test_a_second_run_replaces_nothing(pipe: Any, tmp_path: Path) -> None:
    for seed in (1, 2):
        compare(pipe, settings(seed=seed), tmp_path / "o", schedule=SCHEDULE, model="tiny")
    seeds = [
        json.loads(Image.open(tmp_path / "o" / f"0000{i}.png").text["agentsd"])["seed"]
        for i in range(2)
    ]
    assert seeds == [1, 2]


def test_a_place_that_cannot_be_written_costs_no_image(pipe: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    pipe.unet.forward = None  # a call of the model would raise something else
    with pytest.raises(OutputError, match="file"):
        compare(pipe, settings(), tmp_path / "file", schedule=SCHEDULE, model="tiny")


@pytest.mark.parametrize("prompt", ["👩‍👩‍👧", "tab\there", "two\nlines", "赤い円"])
def test_prompts_of_any_script(prompt: str) -> None:
    assert settings(prompt=prompt).prompt == prompt


def test_the_last_seed_must_be_a_seed(pipe: Any, tmp_path: Path) -> None:
    last = settings(seed=2**63 - 1)
    with pytest.raises(SettingsError, match="seed"):
        compare(pipe, last, tmp_path, schedule=SCHEDULE, model="tiny", num_images=2)


def failing(pipe: Any, how: str) -> Any:
    """A pipeline that fails as real ones do: overflow, memory, weights that do not fit."""
    if how == "overflow":
        pipe.vae.decoder.conv_out.bias.data.fill_(float("nan"))
    elif how == "memory":

        def forward(*_: Any, **__: Any) -> None:
            raise torch.OutOfMemoryError("out of it")

        pipe.unet.forward = forward
    else:
        pipe.unet.conv_in = torch.nn.Conv2d(9, 16, 3, padding=1)
    return pipe


@pytest.mark.parametrize(
    ("how", "says"),
    [("overflow", "try float32"), ("memory", "out of memory on cpu"), ("shape", "failed: ")],
)
def test_what_fails_within_is_an_error(pipe: Any, how: str, says: str) -> None:
    with pytest.raises(GenerationError, match=says):
        make_image(failing(pipe, how), settings())


def test_what_the_pipeline_refuses_is_a_settings_error(pipe: Any) -> None:
    with pytest.raises(SettingsError, match="StableDiffusionPipeline refused"):
        make_image(pipe, settings().model_copy(update={"num_inference_steps": 2000}))


def test_what_the_tokenizer_loses_is_a_warning(pipe: Any) -> None:
    """The tiny tokenizer's words are the letters; 14 tokens fit between start and end."""
    long = "a b c d e f g h i j k l m n x y z"

    def warnings(prompt: str, negative: str = "", guidance: float = 5) -> list[str]:
        return warnings_for(
            pipe, settings(prompt=prompt, negative_prompt=negative, guidance_scale=guidance)
        )

    assert warnings("a B c", "d") == []
    says = "{} too long (17 tokens, at most 14): ignored 'x y z'"
    assert warnings(long) == [says.format("prompt")]
    assert warnings("a", long) == [says.format("negative prompt")]
    assert warnings(long, long) == [says.format("prompt"), says.format("negative prompt")]
    assert warnings("a red ñ") == ["the model does not know the words: red, ñ"]
    assert warnings("a", "red") == ["the model does not know the words of the negative prompt: red"]
    # What is not used loses nothing by its length.
    (unused,) = warnings("a", long, 1)
    assert unused == "the negative prompt is not used: guidance_scale 1 is not above 1"
    assert warnings("a", "", 1) == []
    pipe.unet.register_to_config(time_cond_proj_dim=8)
    assert warnings("a", "b") == [
        "the negative prompt is not used: guidance is built into the model"
    ]
    pipe.tokenizer, pipe.tokenizer_2 = None, pipe.tokenizer  # as SDXL's refiner
    assert warnings(long) == [says.format("prompt")]
