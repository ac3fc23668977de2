"""Sizes, batches, types and masks: every call of the UNet that a pipeline can come to make."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from reversal import AGENTS, check_reversal
from sampling import sample_if
from tiny_models import call, latents, smallest_unet, tiny_unet
from torch import Tensor

from agentsd import Schedule, apply_patch, remove_patch
from agentsd.patching import processor

SHAPES = "Sizes and batches"
SIZES = [(8, 8), (9, 13), (16, 64), (37, 50), (64, 64), (96, 72)]
SCHEDULES: dict[str, dict[str, Any]] = {
    "agent": AGENTS,
    "keys": {"method": "keys", "sx": 4, "sy": 4, "min_tokens": 0},
    "at most 16 agents": {"method": "agent", "agents": 16, "min_tokens": 0},
}


@pytest.mark.cell(SHAPES)
@pytest.mark.parametrize(
    ("size", "settings"),
    [
        pytest.param(
            size,
            settings,
            id=f"{size[0]}x{size[1]} latents, {name}",
            marks=sample_if(size == (9, 13)),
        )
        for size in SIZES
        for name, settings in SCHEDULES.items()
    ],
)
def test_latents_of_any_size(size: tuple[int, int], settings: dict[str, Any]) -> None:
    unet = smallest_unet()
    check_reversal(unet, lambda: call(unet, size=size, batch=1), **settings)


@pytest.mark.cell(SHAPES)
@pytest.mark.parametrize("side", [pytest.param(n, id=f"{n}x{n} latents") for n in (128, 256)])
def test_the_largest_latents(side: int) -> None:
    """Unpatched, such a call takes up to half a minute; another draw shows the patch at work."""
    unet, largest = smallest_unet(), {"size": (side, side), "batch": 1}
    for settings in ({"method": "keys", "keys": 256}, {"agents": 256}):
        one, other = (Schedule(phases=[settings], seed=seed) for seed in (0, 1))
        made = call(apply_patch(unet, one), **largest)
        assert torch.isfinite(made).all()
        assert torch.equal(call(unet, **largest), made)
        assert not torch.equal(call(apply_patch(unet, other), **largest), made)
        remove_patch(unet)


@pytest.mark.cell(SHAPES)
@pytest.mark.parametrize(
    "inputs",
    [
        pytest.param({"prompt": ["a", "b", "c"]}, id="three prompts"),
        pytest.param({"num_images_per_prompt": 3, "seeds": range(3)}, id="three images a prompt"),
        pytest.param({"guidance_scale": 1.0}, id="no guidance"),
        pytest.param({"guidance_rescale": 0.7}, id="rescaled guidance"),
    ],
)
def test_batches(pipe: Any, inputs: dict[str, Any]) -> None:
    def run() -> Tensor:
        made = latents(pipe, steps=2, **inputs)
        assert torch.isfinite(made).all()
        return made

    check_reversal(pipe.unet, run, pipe, **AGENTS)


@pytest.mark.cell(SHAPES, name="another size at each call")
def test_a_size_that_changes_between_calls(pipe: Any) -> None:
    sizes = [(32, 32), (48, 32), (32, 32), (40, 64)]
    alone = []
    for size in sizes:
        alone.append(latents(apply_patch(pipe, **AGENTS), size=size))
        remove_patch(pipe)
    apply_patch(pipe, **AGENTS)
    assert all(
        torch.equal(latents(pipe, size=size), expected)
        for size, expected in zip(sizes, alone, strict=True)
    )


@pytest.mark.cell(SHAPES, name="attention masks", note="such calls run unpatched; it says so once")
def test_masks_are_told_of_once(unet: UNet2DConditionModel) -> None:
    mask = {"attention_mask": torch.ones(2, 256)}
    with pytest.raises(RuntimeError):  # diffusers hands it to layers of every size
        call(unet, **mask)
    flat = tiny_unet(
        block_out_channels=(16,), mid_block_type=None,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
    )  # fmt: skip
    plain = call(flat, **mask)
    apply_patch(flat, **AGENTS | {"max_downsample": 1})
    with pytest.warns(UserWarning, match="calls with an attention_mask unpatched"):
        assert torch.equal(call(flat, **mask), plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(call(flat, **mask), plain)
        assert not torch.equal(call(flat), plain)


TYPES = "Types"


@pytest.mark.cell(TYPES)
@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        pytest.param(
            settings,
            getattr(torch, dtype),
            id=f"{dtype}, {name}",
            marks=sample_if((dtype, name) == ("float16", "keys")),
        )
        for dtype in ("float32", "bfloat16", "float16")
        for name, settings in SCHEDULES.items()
    ],
)
def test_types(settings: dict[str, Any], dtype: torch.dtype) -> None:
    """As close to float32 as the unpatched model of that type is."""
    exact, unet = tiny_unet(), tiny_unet().to(dtype)
    distances = []
    for _ in ("unpatched", "patched"):
        far = call(unet).float() - call(exact)
        distances.append(far.norm() / call(exact).norm())
        apply_patch(exact, **settings)
        apply_patch(unet, **settings)
    assert call(unet).dtype == dtype
    assert distances[1] <= 3 * distances[0] + 1e-6
    remove_patch(unet)
    check_reversal(unet, lambda: call(unet), **settings)


@pytest.mark.cell(TYPES, name="autocast")
@pytest.mark.parametrize("settings", SCHEDULES.values(), ids=SCHEDULES)
def test_autocast(unet: UNet2DConditionModel, settings: dict[str, Any]) -> None:
    def run() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            made = call(unet)
        assert torch.isfinite(made).all()
        return made

    check_reversal(unet, run, **settings)


def eager(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention as it was written before SDPA: scores in the type of the queries."""
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * scale
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v)


def loud(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Give the scores of self-attention sizes that float16 has no numbers for."""
    for name, module in unet.named_modules():
        if name.endswith("attn1"):
            for projection in (module.to_q, module.to_k):
                projection.weight.data *= 600
    return unet


@pytest.mark.cell(
    "Pipelines",
    name="Stable Diffusion 2.1 in float16, attn_precision",
    note='`attn_precision="fp32"` for backends that score in float16; SDPA does not need it',
)
@pytest.mark.parametrize("settings", SCHEDULES.values(), ids=SCHEDULES)
def test_scores_beyond_float16(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager attention overflows in float16 where float32 does not; SDPA sums in float32."""

    def run(**more: Any) -> Tensor:
        unet = tiny_unet(upcast_attention=True, use_linear_projection=True)
        return call(apply_patch(loud(unet).half(), **settings, **more))

    assert torch.isfinite(run()).all()
    monkeypatch.setattr(processor, "dispatch_attention_fn", eager)
    assert not torch.isfinite(run()).all()
    assert torch.isfinite(run(attn_precision="fp32")).all()
