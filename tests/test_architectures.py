"""Shapes of models without their weights, and the command that tells what a schedule does there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import smallest_unet, tiny_pipeline

from agentsd import LoadError, apply_patch, inspect_patch, load_pipeline
from agentsd.cli import main
from agentsd.models.architectures import ARCHITECTURES, load_architecture


def test_tells_what_the_loaded_model_tells() -> None:
    shape, pipe = load_architecture("pocket"), load_pipeline("pocket")
    assert {parameter.device.type for parameter in shape.unet.parameters()} == {"meta"}
    found = [inspect_patch(apply_patch(x, "paper"), 256, 384, "cpu") for x in (shape, pipe)]
    assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_well_known_models(name: str) -> None:
    layers = inspect_patch(
        apply_patch(load_architecture(name), "faithful"), 1024, 1024, "cuda"
    ).layers
    found = {(x.downsample, x.tokens, x.phases[0].plan.keys) for x in layers if x.patched}
    assert found == {(2, 4096, 1024) if name == "sdxl" else (1, 16384, 1024)}


def test_the_device_decides_which_layers_gain() -> None:
    shape = apply_patch(load_architecture("sd15"), "faithful")
    by_device = [inspect_patch(shape, 256, 256, device) for device in ("cpu", "cuda")]
    reasons = [{x.reason for x in found.layers if x.patched} for found in by_device]
    assert reasons == [{None}, {"the schedule changes nothing at this size"}]


def test_a_folder_without_weights_is_enough(pipe: Any, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "model")
    for file in (tmp_path / "model").rglob("*.safetensors"):
        file.unlink()
    found = inspect_patch(load_architecture(str(tmp_path / "model")), 32, 32)
    assert found.layers == inspect_patch(pipe, 32, 32).layers


def test_what_is_no_model_is_an_error(tmp_path: Path) -> None:
    for wrong in ("/nowhere", __file__, "a b"):
        with pytest.raises(LoadError, match="or one of pocket, sd15"):
            load_architecture(wrong)
    with pytest.raises(LoadError, match="configuration cannot be read"):
        load_architecture(str(tmp_path))
    (tmp_path / "vae").mkdir()
    (tmp_path / "unet").mkdir()
    (tmp_path / "vae" / "config.json").write_text('{"block_out_channels": [1]}')
    (tmp_path / "unet" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(LoadError, match="its UNet is a UNet2DModel, not one of UNet2DCondition"):
        load_architecture(str(tmp_path))


@pytest.mark.command("inspect")
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--height", "256", "--width", "384", "--device", "cpu"]
    main_("inspect", *size, "--schedule", "faithful", "--json")
    found = json.loads(capsys.readouterr().out)
    pocket = apply_patch(load_architecture("pocket"), "faithful")
    expected = inspect_patch(pocket, 256, 384, "cpu", num_inference_steps=25)
    assert found == expected.to_dict()
    tiny_pipeline(tmp_path, smallest_unet()).save_pretrained(tmp_path / "model")
    more = ["--model", str(tmp_path / "model"), "--schedule", "balanced"]
    main_("inspect", *size, *more, "--num-inference-steps", "9", "--json")
    assert json.loads(capsys.readouterr().out)["whole_steps"].count(True) == 5


@pytest.mark.slow
def test_the_command_on_a_large_model(capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--height", "256", "--width", "1024", "--device", "cuda"]
    main_("inspect", "--model", "sdxl", *size)
    text = capsys.readouterr().out
    assert "10 of 140 attention layers patched, at 256×1024" in text
    assert "the schedule changes nothing at this size" in " ".join(text.split())


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["--model", "nowhere/at/all"], 2, "not a folder in diffusers' format"),
        (["--schedule", "papre"], 2, "presets are"),
        (["--height", "101"], 2, "height must be a positive multiple of 4 (got 101)"),
        (["--device", "toaster"], 2, "no device 'toaster'"),
    ],
)
def test_wrong_use_is_one_line(
    capsys: pytest.CaptureFixture[str], args: list[str], code: int, says: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["inspect", *args])
    assert ended.value.code == code
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1


def main_(*args: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(list(args))
    assert ended.value.code == 0


def test_weights_are_never_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "load", None)
    monkeypatch.setattr("safetensors.torch.load_file", None)
    monkeypatch.setattr("diffusers.models.modeling_utils.load_state_dict", None)
    assert load_architecture("pocket").vae_scale_factor == 4
