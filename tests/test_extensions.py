"""What else users add to a pipeline: before the patch or after it, the image is the same one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from diffusers import UNet2DConditionModel
from diffusers.models import attention_dispatch
from diffusers.models.attention_processor import XFormersAttnProcessor
from peft import get_peft_model_state_dict
from reversal import AGENTS, UNALIKE, check_likeness
from sampling import with_samples
from tiny_adapters import add_lora, ip_adapter, load_ip_adapter
from tiny_models import (
    WIDTH,
    build,
    call,
    latents,
    patched_layers,
    smallest_unet,
    tiny_pipeline,
    tiny_unet,
)
from torch import Tensor

from agentsd import apply_patch, patched, remove_patch
from agentsd.baselines import deepcache


@pytest.fixture(autouse=True)
def _backend_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers keeps the backend chosen last for all models of the process."""
    registry = attention_dispatch._AttentionBackendRegistry
    monkeypatch.setattr(registry, "_active_backend", registry._active_backend)


def plain(pipe: Any) -> Tensor:
    return latents(pipe, steps=2)


def _lora(pipe: Any) -> None:
    add_lora(pipe.unet)


def _fused_lora(pipe: Any) -> None:
    add_lora(pipe.unet)
    pipe.unet.fuse_lora()


def _unloaded_lora(pipe: Any) -> None:
    add_lora(pipe.unet)
    pipe.unet.fuse_lora()
    pipe.unet.unfuse_lora()
    pipe.unet.unload_lora()


def _second_lora(pipe: Any) -> None:
    """Another set of weights takes the place of the first."""
    add_lora(pipe.unet)
    pipe.unet.delete_adapters("default")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        add_lora(pipe.unet)


def _hot_swapped_lora(pipe: Any) -> None:
    """The weights of a second file, written over those of the first in place."""
    for seed, swap in ((1, False), (2, True)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            add_lora(other := tiny_unet())
        weights = {f"unet.{k}": v for k, v in get_peft_model_state_dict(other).items()}
        pipe.load_lora_weights(weights, adapter_name="mine", hotswap=swap)


def _textual_inversion(pipe: Any) -> None:
    pipe.load_textual_inversion({"<mine>": torch.ones(1, WIDTH)})


def _offload(kind: str) -> Callable[[Any], None]:
    def change(pipe: Any) -> None:
        if kind == "group":
            pipe.unet.enable_group_offload(
                onload_device=torch.device("cpu"), offload_type="leaf_level"
            )
        else:
            from accelerate import cpu_offload, cpu_offload_with_hook

            move = cpu_offload if kind == "sequential" else cpu_offload_with_hook
            move(pipe.unet, torch.device("cpu"))

    return change


EXTENSIONS: dict[str, Callable[[Any], None]] = {
    "LoRA": _lora,
    "LoRA, fused": _fused_lora,
    "LoRA, fused and unloaded": _unloaded_lora,
    "LoRA, replaced by another": _second_lora,
    "LoRA, hot-swapped": _hot_swapped_lora,
    "fused projections": lambda pipe: pipe.fuse_qkv_projections(vae=False),
    "FreeU": lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
    "textual inversion": _textual_inversion,
    "attention backend": lambda pipe: pipe.unet.set_attention_backend("_native_math"),
    "model offload": _offload("model"),
    "sequential offload": _offload("sequential"),
    "group offload": _offload("group"),
    "layerwise casting": lambda pipe: pipe.unet.enable_layerwise_casting(
        storage_dtype=torch.bfloat16, compute_dtype=torch.float32
    ),
    "VAE tiling and slicing": lambda pipe: (pipe.vae.enable_tiling(), pipe.vae.enable_slicing()),
    "channels last": lambda pipe: pipe.unet.to(memory_format=torch.channels_last),
    "torch.compile": lambda pipe: pipe.unet.compile(backend="eager", fullgraph=True),
}


EITHER = "Extensions, before the patch or after it"


@pytest.mark.cell(EITHER)
@pytest.mark.parametrize("name", with_samples(EXTENSIONS, "LoRA", "group offload"))
def test_before_or_after_the_patch(name: str, tmp_path: Path) -> None:
    make = smallest_unet if name == "torch.compile" else tiny_unet  # compiling takes long
    before, after = tiny_pipeline(tmp_path, make()), tiny_pipeline(tmp_path, make())
    EXTENSIONS[name](before)
    base = plain(before)
    apply_patch(before, **AGENTS)
    one = plain(before)
    apply_patch(after, **AGENTS)
    EXTENSIONS[name](after)
    other = plain(after)
    check_likeness(one, base, UNALIKE)  # a LoRA of random weights asks much
    assert not torch.allclose(one, base, atol=1e-4)
    torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)
    for pipe in (before, after):
        assert patched_layers(pipe.unet)
        remove_patch(pipe)
        torch.testing.assert_close(plain(pipe), base, rtol=1e-4, atol=1e-4)


@pytest.mark.cell(
    EITHER,
    name="attention slicing",
    verdict="refused",
    note="it replaces the processors; a warning says so, and slicing saves nothing beside SDPA",
)
def test_sliced_attention_is_told_of(pipe: Any) -> None:
    apply_patch(pipe, **AGENTS)
    pipe.enable_attention_slicing()
    with pytest.warns(UserWarning, match=r"SlicedAttnProcessor.*apply_patch again"):
        plain(pipe)


@pytest.mark.cell(
    EITHER,
    name="xFormers",
    verdict="refused",
    note="it replaces the processors; a warning says so; the attention backend of that name works",
)
def test_xformers_is_told_of(pipe: Any) -> None:
    """diffusers itself refuses where xFormers is missing, and leaves the patch as it is."""
    apply_patch(pipe, **AGENTS)
    one = plain(pipe)
    with pytest.raises(ModuleNotFoundError, match="xformers"):
        pipe.enable_xformers_memory_efficient_attention()
    assert torch.equal(plain(pipe), one)
    for module in pipe.unet.modules():  # what diffusers does where it is there, and a GPU
        if hasattr(module, "set_processor"):
            module.set_processor(XFormersAttnProcessor())
    with (
        pytest.warns(UserWarning, match=r"XFormersAttnProcessor.*apply_patch again"),
        pytest.raises(AttributeError, match="ops"),  # it is not here to be called
    ):
        plain(pipe)


@pytest.mark.cell(EITHER, name="DIFFUSERS_ATTN_BACKEND")
def test_the_backend_of_the_environment_is_used() -> None:
    """The variable is read once, as diffusers is imported: in a process of its own."""
    code = """
import sys
from pathlib import Path
from unittest.mock import patch
sys.path.insert(0, sys.argv[1])
from diffusers.models import attention_dispatch
from tiny_models import call, tiny_unet
from agentsd import apply_patch
registry, used = attention_dispatch._AttentionBackendRegistry, set()
def counted(name, run):
    return lambda *args, **kwargs: (used.add(name), run(*args, **kwargs))[1]
for name, run in registry._backends.items():
    registry._backends[name] = counted(name.value, run)
call(apply_patch(tiny_unet(), method="keys", max_downsample=2, min_tokens=0))
print(*used)
"""
    backend = "_native_math"
    assert attention_dispatch._AttentionBackendRegistry.get_active_backend()[0] != backend
    result = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent)],
        env=os.environ | {"DIFFUSERS_ATTN_BACKEND": backend},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.split() == [backend]


@pytest.mark.cell(EITHER, name="device_map")
def test_device_map(pipe: Any, tmp_path: Path) -> None:
    """Loaded across devices by accelerate; parts on disk return for their turn."""
    pipe.unet.save_pretrained(tmp_path / "unet")
    plain, expected = call(pipe.unet), call(apply_patch(pipe.unet, **AGENTS))
    whole = UNet2DConditionModel.from_pretrained(tmp_path / "unet", device_map="auto")
    parts = {name: ("disk", "cpu")[i % 2] for i, (name, _) in enumerate(whole.named_children())}
    split = dispatch_model(
        UNet2DConditionModel.from_pretrained(tmp_path / "unet"),
        parts,
        main_device="cpu",
        offload_dir=str(tmp_path / "disk"),
        force_hooks=True,
    )
    for unet in (whole, split):
        assert torch.equal(call(apply_patch(unet, **AGENTS)), expected)
        assert torch.equal(call(remove_patch(unet)), plain)


@pytest.mark.cell(EITHER, name="IP-Adapters, one and several")
def test_several_ip_adapters(pipe: Any, tmp_path: Path) -> None:
    def load(into: Any) -> None:
        weights = [build(lambda: ip_adapter(into.unet), seed) for seed in (0, 1)]
        into.load_ip_adapter(
            weights, subfolder=["", ""], weight_name=["", ""], image_encoder_folder=None
        )

    def with_images(of: Any) -> Tensor:
        seen = [torch.ones(2, 1, 8), torch.zeros(2, 1, 8)]
        return latents(of, steps=2, ip_adapter_image_embeds=seen)

    other = tiny_pipeline(tmp_path)
    load(pipe)
    base = with_images(pipe)
    one = with_images(apply_patch(pipe, **AGENTS))
    apply_patch(other, **AGENTS)
    load(other)
    assert torch.equal(with_images(other), one)
    assert not torch.equal(one, base)
    assert torch.equal(with_images(remove_patch(pipe)), base)
    load_ip_adapter(pipe)  # one in the place of two
    assert not patched_layers(pipe.unet)


@pytest.mark.cell(EITHER, name="DeepCache", note="with schedules that have no cache")
def test_deepcache_beside_a_patch(pipe: Any) -> None:
    both = []
    for order in ("patch first", "DeepCache first"):
        first, second = patched(pipe, **AGENTS), deepcache(pipe, interval=2)
        outer, inner = (first, second) if order == "patch first" else (second, first)
        with outer, inner:
            both.append(latents(pipe))
    assert torch.equal(*both)
    with deepcache(pipe, interval=2):
        alone = latents(pipe)
    assert not torch.equal(alone, both[0])
    check_likeness(both[0], alone)


@pytest.mark.cell("The pipeline as a whole", name="save_pretrained", note="saves the clean model")
def test_the_saved_model_is_the_clean_one(pipe: Any, tmp_path: Path) -> None:
    base = plain(pipe)
    apply_patch(pipe, **AGENTS).save_pretrained(tmp_path / "saved")
    again = type(pipe).from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    assert not patched_layers(again.unet)
    assert torch.equal(plain(again), base)


@pytest.mark.cell(
    "The pipeline as a whole",
    name="two pipelines in two threads",
    note="each with a UNet of its own; one UNet in two threads at once is not supported",
)
def test_two_pipelines_in_two_threads(tmp_path: Path) -> None:
    pipes = [tiny_pipeline(tmp_path) for _ in range(2)]
    for pipe, schedule in zip(pipes, ("paper", "faithful"), strict=True):
        apply_patch(pipe, schedule, min_tokens=0)
    alone = [latents(pipe, steps=6) for pipe in pipes]
    assert not torch.equal(*alone)
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            found = list(pool.map(lambda pipe: latents(pipe, steps=6), pipes))
            assert [torch.equal(a, b) for a, b in zip(found, alone, strict=True)] == [True, True]
