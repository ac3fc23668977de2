"""Pipelines of every kind that diffusers makes of such UNets: patched, run, and put back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from reversal import check_reversal
from sampling import with_samples
from tiny_models import tiny_unet
from tiny_pipelines import PIPELINES, controlled, run

from agentsd import PatchError, apply_patch, inspect_patch
from agentsd.patching.layers import find_attention_layers


@pytest.mark.cell("Pipelines")
@pytest.mark.parametrize("name", with_samples(PIPELINES, "SDXL base", "ControlNet"))
def test_patched_it_differs_and_is_put_back(name: str, tmp_path: Path) -> None:
    pipe, inputs = PIPELINES[name](tmp_path)
    check_reversal(pipe.unet, lambda: run(pipe, inputs), pipe, max_downsample=4)


@pytest.mark.parametrize("name", ["AnimateDiff", "Stable Video Diffusion"])
def test_attention_over_frames_is_left_alone(name: str, tmp_path: Path) -> None:
    pipe, _ = PIPELINES[name](tmp_path)
    apply_patch(pipe, max_downsample=4)
    layers = inspect_patch(pipe).layers
    over_frames = [x for x in layers if "motion" in x.name or "temporal" in x.name]
    assert over_frames
    assert not any(layer.patched for layer in over_frames)
    if name == "AnimateDiff":  # SVD's are blocks of another class
        reasons = {x.reason for x in over_frames if x.name.endswith("attn1")}
        assert reasons == {"it attends across frames, not across the image"}
    others = [x for x in layers if x not in over_frames and x.name.endswith("attn1")]
    assert all(layer.patched for layer in others)


@pytest.mark.cell(
    "Pipelines",
    name="a ControlNet's own attention",
    note="`apply_patch(pipe.controlnet)`, of several one by one",
)
def test_a_controlnet_is_patched_on_request(tmp_path: Path) -> None:
    pipe, inputs = controlled(tmp_path)
    base = run(pipe, inputs)
    apply_patch(pipe, max_downsample=4, min_tokens=0)
    assert not any(layer.patched for layer in inspect_patch(pipe.controlnet).layers)
    with_unet = run(pipe, inputs)
    check_reversal(pipe.controlnet, lambda: run(pipe, inputs), max_downsample=4)
    assert not torch.equal(run(pipe, inputs), base)
    assert torch.equal(run(pipe, inputs), with_unet)


def test_several_controlnets_are_patched_one_by_one(tmp_path: Path) -> None:
    pipe, inputs = controlled(tmp_path, 2)
    with pytest.raises(PatchError, match="pass one of its nets"):
        apply_patch(pipe.controlnet)
    check_reversal(pipe.controlnet.nets[1], lambda: run(pipe, inputs), max_downsample=4)


@pytest.mark.cell(
    "Pipelines",
    name="Kandinsky 2.2, DeepFloyd",
    verdict="refused",
    note="their attention takes in text and places at once; the error says so",
)
def test_attention_to_text_and_places_at_once_is_refused_with_the_reason() -> None:
    unet = tiny_unet(
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        block_out_channels=(16, 32),
        encoder_hid_dim=8,
        encoder_hid_dim_type="image_proj",
        addition_embed_type="image",
        resnet_time_scale_shift="scale_shift",
    )
    before = [layer.module.processor for layer in find_attention_layers(unet)]
    with pytest.raises(PatchError, match="image and text at once"):
        apply_patch(unet)
    assert [layer.module.processor for layer in find_attention_layers(unet)] == before
