"""What is added to a pipeline: that it changes the image, is recorded, and is refused if wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from safetensors.torch import save_file
from tiny_adapters import controlnet, ip_adapter, save_lora
from tiny_models import build
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from agentsd import LoadError, SettingsError
from agentsd.generation.images import make_batch, to_image
from agentsd.generation.prompt_encoding import PromptEncoder
from agentsd.image_settings import ImageSettings
from agentsd.models.adapters import configure_pipeline
from agentsd.models.fingerprints import file_sha256
from agentsd.models.options import PipelineOptions
from agentsd.models.schedulers import scheduler_for

SETTINGS = ImageSettings(prompt="a b", num_inference_steps=2, height=64, width=64)


@pytest.fixture
def picture(tmp_path: Path) -> str:
    Image.new("RGB", (80, 48), "teal").save(tmp_path / "picture.png")
    return str(tmp_path / "picture.png")


@pytest.fixture
def lora(pipe: Any, tmp_path: Path) -> str:
    return save_lora(pipe, tmp_path / "lora", "pytorch_lora_weights.safetensors")


def made(pipe: Any, options: PipelineOptions, **how: Any) -> bytes:
    """The image of a pipeline with options; a batch of two, as inputs must serve any batch."""
    ready = configure_pipeline(pipe, options, **how)
    ready.set_progress_bar_config(disable=True)
    call_kwargs = options.call_kwargs(64, 64)
    drawn = make_batch(ready, [SETTINGS] * 2, PromptEncoder(ready), call_kwargs)
    first, second = (to_image(one.pixels) for one in drawn)
    assert first.size == (64, 64)
    assert first.tobytes() == second.tobytes()
    return first.tobytes()


def test_plms_is_without_runge_kutta_steps(pipe: Any) -> None:
    pipe.scheduler = DDIMScheduler(prediction_type="v_prediction")
    plms = scheduler_for(pipe, "PLMS")
    plms.set_timesteps(10)
    assert len(plms.timesteps) == 11  # diffusers' own default takes 12 more
    assert plms.config.prediction_type == "v_prediction"


@pytest.mark.slow
def test_each_changes_the_image(pipe: Any, tmp_path: Path, picture: str, lora: str) -> None:
    plain = made(pipe, PipelineOptions())
    scheduler = pipe.scheduler
    by_name = made(pipe, PipelineOptions(scheduler="euler A"))
    assert type(pipe.scheduler).__name__ == "EulerAncestralDiscreteScheduler"
    assert (
        made(pipe, PipelineOptions(scheduler="EulerAncestralDiscreteScheduler")) == by_name != plain
    )
    pipe.scheduler = scheduler
    assert made(pipe, PipelineOptions(init_image=picture, strength=0.5)) != plain
    net = controlnet(pipe, tmp_path)
    assert made(pipe, PipelineOptions(controlnet=net, control_image=picture)) != plain
    both = PipelineOptions(controlnet=net, control_image=picture, init_image=picture)
    assert made(pipe, both) != plain
    assert made(pipe, PipelineOptions()) == plain
    full = made(pipe, PipelineOptions(loras=(lora,)))
    pipe.unload_lora_weights()
    half = made(pipe, PipelineOptions(loras=(f"{lora}:0.5",)))
    assert len({plain, full, half}) == 3


def test_ip_adapter_follows_its_image(pipe: Any, tmp_path: Path, picture: str) -> None:
    vision = CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=16,
        patch_size=8,
        projection_dim=8,
    )
    build(lambda: CLIPVisionModelWithProjection(vision)).save_pretrained(tmp_path / "image_encoder")
    weights = build(lambda: ip_adapter(pipe.unet))
    flat = {
        f"{part}.{name}": value for part, named in weights.items() for name, value in named.items()
    }
    save_file(flat, tmp_path / "adapter.safetensors")
    plain = made(pipe, PipelineOptions())
    Image.new("RGB", (80, 48), "orange").save(tmp_path / "other.png")
    file, other = str(tmp_path / "adapter.safetensors"), str(tmp_path / "other.png")
    first = made(pipe, PipelineOptions(ip_adapter=file, ip_image=picture))
    assert len({plain, first, made(pipe, PipelineOptions(ip_adapter=file, ip_image=other))}) == 3
    known = PipelineOptions(ip_adapter=file, ip_image=picture).weights()
    assert known[file] == file_sha256(file)
    build(lambda: CLIPVisionModelWithProjection(vision), seed=1).save_pretrained(
        tmp_path / "image_encoder"
    )
    changed = PipelineOptions(ip_adapter=file, ip_image=picture).weights()
    assert [name for name in known if changed[name] != known[name]] == [
        str(tmp_path / "image_encoder")
    ]


def test_memory_and_speed_are_diffusers_own(pipe: Any) -> None:
    asked = PipelineOptions(vae_slicing=True, vae_tiling=True, attention_backend="native")
    assert made(pipe, asked)
    assert pipe.vae.use_slicing
    assert pipe.vae.use_tiling


def test_a_weight_has_one_spelling() -> None:
    for spelled in ("a", "a:1", "a:1.0"):
        assert PipelineOptions(loras=(spelled,)).loras == ("a",)
    assert PipelineOptions(loras=("a:.50", "a:-2")).loras == ("a:0.5", "a:-2.0")


def test_the_record_gives_them_back(picture: str) -> None:
    options = PipelineOptions(
        scheduler="DDIM", loras=("a:0.5", "b"), init_image=picture, vae_tiling=True
    )
    record = options.recorded()
    assert PipelineOptions.from_record({**record, "seed": 3}).recorded() == record
    assert PipelineOptions().recorded() == {}
    Image.new("RGB", (8, 8)).save(Path(picture).with_name("other.png"))
    other = PipelineOptions(init_image=str(Path(picture).with_name("other.png"))).recorded()
    assert other["init_image_sha256"] != record["init_image_sha256"]


@pytest.mark.parametrize(
    ("setting", "spellings"),
    [
        ("scheduler", ["DPM++ 2M", "dpm++2m", " DPM++  2M", "dpm_solver_multistep"]),
        ("scheduler", ["Euler a", "euler_a", "EulerA", "EulerAncestralDiscreteScheduler"]),
        ("loras", [("a",), ("a:1",), ("a:1.0",)]),
        ("loras", [("a:0.5",), ("a:.50",)]),
        ("loras", [("a:2:1",), ("a:2:1.0",)]),  # of a file called a:2
    ],
)
def test_one_spelling_is_on_record(
    setting: str, spellings: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a resumed run would count as another."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:2").touch()
    parsed = [PipelineOptions(**{setting: spelling}) for spelling in spellings]
    assert len({getattr(options, setting) for options in parsed}) == 1
    assert PipelineOptions.from_record(parsed[0].recorded()) == parsed[0]
    assert len({*PipelineOptions(loras=("a", "a:2", "a:2:1")).loras}) == 3


def test_a_controlnet_of_which_there_is_a_variant_alone(
    pipe: Any, tmp_path: Path, picture: str
) -> None:
    folder = Path(controlnet(pipe, tmp_path))
    whole = made(pipe, PipelineOptions(controlnet=str(folder), control_image=picture))
    (file,) = folder.glob("*.safetensors")
    file.rename(folder / "diffusion_pytorch_model.fp16.safetensors")
    assert made(pipe, PipelineOptions(controlnet=str(folder), control_image=picture)) == whole


@pytest.mark.parametrize("weights", ["none", "half", "pickle"])
def test_weights_that_cannot_be_loaded(pipe: Any, tmp_path: Path, weights: str) -> None:
    folder = tmp_path / "lora"
    folder.mkdir()
    if weights == "half":
        (folder / "pytorch_lora_weights.safetensors").write_bytes(b"\x10" + b"\0" * 40)
    elif weights == "pickle":
        torch.save({}, folder / "pytorch_lora_weights.bin")
    with pytest.raises(LoadError, match=r"the LoRA .* cannot be loaded"):
        configure_pipeline(pipe, PipelineOptions(loras=(str(folder),)))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (lambda image: {"init_image": "nowhere.png"}, "nowhere.png: cannot be read"),
        (lambda image: {"init_image": image, "strength": 0.0}, "greater than 0"),
        (lambda image: {"strength": 0.5}, "strength requires init_image"),
        (lambda image: {"controlnet": "x"}, "each needs the other"),
        (lambda image: {"ip_image": image}, "each needs the other"),
        (lambda image: {"compile": "yes"}, "valid boolean"),
        (lambda image: {"loras": ("a:nan",)}, "weight of 'a' must be a finite number"),
    ],
)
def test_bad_options(picture: str, given: Callable[[str], dict[str, Any]], says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        PipelineOptions(**given(picture)).check_files()


def test_a_pickled_ip_adapter_is_refused(pipe: Any, picture: str) -> None:
    with pytest.raises(LoadError, match="allow-pickle"):
        configure_pipeline(pipe, PipelineOptions(ip_adapter="some/where/a.bin", ip_image=picture))


def test_unknown_names_are_errors_that_list_the_known(pipe: Any) -> None:
    with pytest.raises(SettingsError, match=r"choose one of .*DDIM.*Euler a"):
        configure_pipeline(pipe, PipelineOptions(scheduler="Eular"))
    with pytest.raises(SettingsError, match="native"):
        configure_pipeline(pipe, PipelineOptions(attention_backend="fast"))
    with pytest.raises(SettingsError, match="on the CPU already"):
        configure_pipeline(pipe, PipelineOptions(), offload="model")


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"loras": ("nowhere.safetensors",)}, "the LoRA"),
        ({"loras": ("./nowhere:0.5",)}, "the LoRA"),
        ({"loras": ("models/loras/nowhere.safetensors:0.5",)}, "the LoRA"),
        ({"loras": ("models/loras/nowhere",)}, "the LoRA"),
        ({"controlnet": "/no/such/net"}, "the ControlNet"),
        ({"controlnet": "models/nets/nowhere"}, "the ControlNet"),
        ({"ip_adapter": "./nowhere.safetensors"}, "the IP-Adapter"),
        ({"ip_adapter": "models/nowhere.safetensors"}, "the IP-Adapter"),
    ],
)
def test_files_that_are_not_there(picture: str, given: dict[str, Any], what: str) -> None:
    """Told in plain words before anything is loaded, and the hub is not asked."""
    with pytest.raises(LoadError, match=rf"{what} '.*': there is no such file or folder"):
        PipelineOptions(**given, **followed(given, picture)).check_files()


def test_options_open_no_file() -> None:
    """They are values: a record names files of another machine, too."""
    options = PipelineOptions(init_image="nowhere.png", loras=("./nowhere.safetensors",))
    with pytest.raises(SettingsError, match=r"nowhere.png: cannot be read"):
        options.check_files()


@pytest.mark.parametrize(
    "given",
    [
        {"loras": ("nobody/nowhere",)},
        {"controlnet": "nobody/nowhere"},
        {"ip_adapter": "nobody/nowhere/models/a.safetensors"},
    ],
)
def test_what_may_be_on_the_hub(
    pipe: Any, picture: str, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(LoadError, match="not a local folder or file, and the hub did not"):
        configure_pipeline(pipe, PipelineOptions(**given, **followed(given, picture)))


def followed(given: dict[str, Any], picture: str) -> dict[str, str]:
    """The image that a ControlNet or an IP-Adapter needs."""
    images = {"controlnet": "control_image", "ip_adapter": "ip_image"}
    return {images[name]: picture for name in given if name in images}
