"""Loading: folders, single files, and everything that is not a model."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from single_file import save_single_file
from tiny_models import tiny_pipeline

from agentsd import LoadError, load_pipeline
from agentsd.attributes import replaced_attribute
from agentsd.models.loading import POCKET, only_variant


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    tiny_pipeline(folder).save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A folder that a test may change."""
    return shutil.copytree(saved, tmp_path / "model")


def same_weights(a: Any, b: Any) -> bool:
    parts = ("unet", "vae", "text_encoder")
    pairs = [(getattr(a, p).state_dict(), getattr(b, p).state_dict()) for p in parts]
    return all(x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in pairs)


def test_folder_and_single_file_hold_the_same_model(
    pipe: Any, folder: Path, tmp_path: Path
) -> None:
    file = save_single_file(pipe, tmp_path / "model.safetensors")
    from_file = load_pipeline(file, device="cpu", config=str(folder))
    assert same_weights(load_pipeline(str(folder), device="cpu"), pipe)
    assert same_weights(from_file, pipe)
    from_file.unet.conv_in.bias.data += 1
    assert not same_weights(from_file, pipe)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_dtype(folder: Path, dtype: Any) -> None:
    wanted = dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
    loaded = load_pipeline(folder, device="cpu", dtype=dtype)
    for part in ("unet", "vae", "text_encoder"):
        assert {p.dtype for p in getattr(loaded, part).parameters()} == {wanted}


def test_pocket_is_float32_on_the_cpu() -> None:
    pipe = load_pipeline("pocket", device="cpu")
    for part in ("unet", "vae", "text_encoder"):
        assert {p.dtype for p in getattr(pipe, part).parameters()} == {torch.float32}
    assert sum(f.stat().st_size for f in POCKET.rglob("*") if f.is_file()) <= 40 * 2**20
    assert pipe.unet.config.sample_size == 64


def broken(folder: Path, tmp_path: Path, kind: str) -> str:
    """Make something that is not a model and return what a user would give for it."""
    if kind == "missing":
        return str(tmp_path / "nowhere")
    if kind == "hub id":
        return "nobody-at-all/no-such-model"
    if kind == "missing file":
        return "sd.safetensors"
    if kind == "long name":
        return "x" * 5000
    if kind == "folder of another kind":
        return str(folder / "unet")
    if kind == "half a folder":
        weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        return str(folder)
    if kind == "pickle folder":
        part = folder / "unet"
        (part / "diffusion_pytorch_model.safetensors").unlink()
        torch.save({}, part / "diffusion_pytorch_model.bin")
        return str(folder)
    file = tmp_path / "file.safetensors"
    if kind == "torn file":
        save_file({"a": torch.zeros(1000)}, file)
        file.write_bytes(file.read_bytes()[:-100])
    elif kind == "another file":
        save_file({"a": torch.zeros(2)}, file)
    else:
        file = tmp_path / "model.ckpt"
        torch.save({}, file)
    return str(file)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("missing", "neither a local folder or file nor 'pocket'"),
        ("hub id", "neither a local folder or file nor a"),
        ("half a folder", "cannot be loaded"),
        ("pickle folder", "must be .safetensors files"),
        ("torn file", "not a complete safetensors file"),
        ("another file", "not a full Stable Diffusion checkpoint"),
        ("pickle file", "refused"),
        ("missing file", "neither a local folder or file nor 'pocket'"),
        ("long name", "neither a local folder or file nor 'pocket'"),
        ("folder of another kind", "has no model_index.json"),
    ],
)
def test_what_is_no_model_is_a_load_error(
    folder: Path, tmp_path: Path, kind: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(LoadError, match=says):
        load_pipeline(broken(folder, tmp_path, kind), device="cpu")


def test_unknown_device_and_dtype(folder: Path) -> None:
    with pytest.raises(LoadError, match="no device 'abacus': use cpu, cuda or mps"):
        load_pipeline(folder, device="abacus")
    with pytest.raises(LoadError, match="float32, float16, bfloat16"):
        load_pipeline(folder, device="cpu", dtype="int8")
    if not torch.cuda.is_available():
        with pytest.raises(LoadError, match="no device 'cuda' here"):
            load_pipeline(folder, device="cuda")


@pytest.mark.parametrize("shards", [False, True])
def test_the_only_variant_of_a_folder_is_found(folder: Path, shards: bool) -> None:
    pipe = load_pipeline(folder, device="cpu")
    weights = pipe.unet.state_dict()
    size = {"max_shard_size": "50KB"} if shards else {}
    for path in folder.glob("*/*.safetensors"):
        path.unlink()
    pipe.save_pretrained(folder, variant="fp16", **size)
    assert any(folder.glob("unet/*.fp16*.safetensors"))
    assert only_variant(folder) == "fp16"
    again = load_pipeline(folder, device="cpu").unet.state_dict()
    assert all(torch.equal(again[name], value) for name, value in weights.items())
    with pytest.raises(LoadError) as raised:
        load_pipeline(folder, device="cpu", variant="ema")
    assert "pickle" not in str(raised.value)
    pipe.save_pretrained(folder)  # now there is a choice, and the plain one is taken
    assert only_variant(folder) is None


def test_several_variants_are_not_chosen_from(folder: Path) -> None:
    plain = next(folder.glob("unet/*.safetensors"))
    for variant in ("fp16", "ema"):
        plain.with_name(f"diffusion_pytorch_model.{variant}.safetensors").write_bytes(b"")
    plain.unlink()
    assert only_variant(folder) is None
    with pytest.raises(LoadError, match=r"only has weights of variants \(ema, fp16\); choose one"):
        load_pipeline(folder, device="cpu")
    other = next(folder.glob("vae/*.safetensors"))  # the one that all parts have is no choice
    other.rename(other.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert only_variant(folder) == "fp16"


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_one_part_may_be_of_a_variant(folder: Path, part: str) -> None:
    expected = getattr(load_pipeline(folder, device="cpu"), part).state_dict()
    (plain,) = folder.glob(f"{part}/*.safetensors")
    plain.rename(plain.with_name(plain.name.replace(".", ".fp16.", 1)))
    (folder / part / "old.bin").write_bytes(b"")
    again = getattr(load_pipeline(folder, device="cpu"), part).state_dict()
    assert all(torch.equal(again[name], value) for name, value in expected.items())
    with pytest.raises(LoadError) as raised:
        load_pipeline(folder, device="cpu", variant="ema")
    assert "pickle" not in str(raised.value)


def test_a_variant_of_pickles(folder: Path) -> None:
    (plain,) = folder.glob("unet/*.safetensors")
    torch.save(load_file(plain), plain.with_name("diffusion_pytorch_model.fp16.bin"))
    expected = load_file(plain)
    plain.unlink()
    again = load_pipeline(folder, device="cpu", allow_pickle=True).unet.state_dict()
    assert all(torch.equal(again[name], value) for name, value in expected.items())
    with pytest.raises(LoadError, match="pickles can execute arbitrary code"):
        load_pipeline(folder, device="cpu")


def test_only_the_hub_has_revisions(folder: Path) -> None:
    for model in ("pocket", str(folder)):
        with pytest.raises(LoadError, match="only the hub has revisions"):
            load_pipeline(model, device="cpu", revision="main")


def test_a_single_file_has_no_variants(pipe: Any, tmp_path: Path) -> None:
    file = save_single_file(pipe, tmp_path / "model.safetensors")
    with pytest.raises(LoadError, match="single file, which has no variants"):
        load_pipeline(file, device="cpu", variant="fp16")


LOADING = """
import agentsd
from agentsd.models import adapters
agentsd.load_pipeline({model!r}, device="cpu")
"""

AS_DIFFUSERS_DOES = """
from diffusers import StableDiffusionPipeline
StableDiffusionPipeline.from_pretrained({model!r})
"""


def output_of(code: str) -> str:
    """What a new process prints on either stream."""
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return made.stdout + made.stderr


@pytest.mark.slow
def test_loading_prints_nothing() -> None:
    assert output_of(LOADING.format(model=str(POCKET))) == ""
    assert "Loading" in output_of(AS_DIFFUSERS_DOES.format(model=str(POCKET)))  # the control


@pytest.mark.parametrize("enabled", [True, False])
def test_loading_leaves_the_users_progress_bars_as_they_were(folder: Path, enabled: bool) -> None:
    for package in (diffusers, transformers):
        switch = package.utils.logging
        with replaced_attribute(switch, "_tqdm_active", enabled):
            load_pipeline(folder, device="cpu")
            assert switch.is_progress_bar_enabled() is enabled


def test_loading_reports_weights_that_are_not_used(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(weights) | {"stray.weight": torch.zeros(1)}, weights)
    logger = logging.getLogger("diffusers")
    with replaced_attribute(logger, "propagate", True):
        load_pipeline(folder, device="cpu")
    assert "stray.weight" in caplog.text
