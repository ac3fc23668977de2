"""Baselines compute what they promise and leave no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from reversal import check_unchanged, snapshot
from tiny_models import call, latents

from agentsd import PatchError, Schedule, patched
from agentsd.baselines import BASELINES, deepcache, tiles, todo, tomesd

SETTINGS: dict[str, dict[str, Any]] = {
    "tomesd": {"ratio": 0.5},
    "deepcache": {"interval": 2},
    "todo": {"stride": 2},
    "tiles": {"side": 4},
    "fewer-steps": {"num_inference_steps": 3},
    "taylorseer": {"interval": 2, "order": 1},
    "spectrum": {"interval": 2, "degree": 2},
}
STEPS = 4


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_changes_the_image_and_leaves_no_trace(pipe: Any, name: str) -> None:
    before, plain = snapshot(pipe.unet), latents(pipe, steps=STEPS)
    rng = torch.get_rng_state()
    found = []
    for _ in range(2):
        with BASELINES[name](pipe, **SETTINGS[name]) as same:
            assert same is pipe
            found.append(latents(pipe, steps=STEPS))
    assert not torch.equal(found[0], plain)
    assert torch.equal(*found)  # the same at each entry
    with pytest.raises(KeyboardInterrupt), BASELINES[name](pipe, **SETTINGS[name]):
        raise KeyboardInterrupt
    check_unchanged(pipe.unet, before)
    assert torch.equal(latents(pipe, steps=STEPS), plain)
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize("size", [(16, 16), (10, 14)])
def test_todo_is_keys_on_a_fixed_grid(unet: UNet2DConditionModel, size: tuple[int, int]) -> None:
    def keys(**more: Any) -> Schedule:
        return Schedule(phases=({"method": "keys", "max_downsample": 1, "min_tokens": 0} | more,))

    with todo(unet, 2):
        found = call(unet, size=size)
    for schedule, same in (
        (keys(select="grid"), True),
        (keys(select="cycle"), False),
        (keys(select="grid", sx=4), False),
    ):
        with patched(unet, schedule):
            assert torch.allclose(found, call(unet, size=size), atol=1e-5) == same


def test_tiles_attend_within_themselves(unet: UNet2DConditionModel) -> None:
    layer = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    seen: list[Any] = []
    layer.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    with tiles(unet, 5):  # 5 does not divide 16: tiles of 8
        call(unet)
    x, out = seen[0]
    plain = AttnProcessor2_0()
    for rows in (slice(0, 8), slice(8, 16)):
        for columns in (slice(0, 8), slice(8, 16)):
            tile = x.unflatten(1, (16, 16))[:, rows, columns].flatten(1, 2)
            of_tile = out.unflatten(1, (16, 16))[:, rows, columns].flatten(1, 2)
            with torch.no_grad():
                assert torch.allclose(plain(layer, tile), of_tile, atol=1e-5)
    with torch.no_grad():
        assert not torch.allclose(plain(layer, x), out, atol=1e-5)
    with tiles(unet, 16):
        one = call(unet)
    assert torch.allclose(one, call(unet), atol=1e-6)


def test_deepcache_skips_the_deep_blocks(pipe: Any) -> None:
    deep: list[int] = []
    pipe.unet.mid_block.resnets[0].register_forward_hook(lambda *_: deep.append(1))
    latents(pipe, steps=4)
    assert len(deep) == 4
    with deepcache(pipe, 3):
        latents(pipe, steps=4)
    assert len(deep) == 4 + 2


def test_tomesd_merges(unet: UNet2DConditionModel) -> None:
    """Fewer tokens reach the top layer, and all of them leave the block."""
    layer = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    seen: list[int] = []
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    with tomesd(unet, 0.25):
        call(unet)
    assert seen == [192]


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("tomesd", {"ratio": 0.9}, "ratio must be in"),
        ("deepcache", {"interval": 1}, "interval must be"),
        ("todo", {"stride": 1}, "stride must be"),
        ("tiles", {"side": 2.5}, "side must be"),
        ("fewer-steps", {"num_inference_steps": 0}, "num_inference_steps must be"),
        ("taylorseer", {"interval": 1}, "interval must be"),
        ("taylorseer", {"order": 5}, "order must be"),
        ("spectrum", {"interval": 1}, "interval must be"),
        ("spectrum", {"degree": 0}, "degree must be"),
        ("spectrum", {"ridge": 0.0}, "ridge must be"),
    ],
)
def test_invalid_settings(pipe: Any, name: str, settings: Any, says: str) -> None:
    with pytest.raises(PatchError, match=f"{name}: {says}"), BASELINES[name](pipe, **settings):
        pass
    with pytest.raises(PatchError, match="no UNet"), BASELINES[name](object()):
        pass


@pytest.mark.parametrize("name", ["deepcache", "fewer-steps", "taylorseer", "spectrum"])
def test_what_needs_a_pipeline(unet: UNet2DConditionModel, name: str) -> None:
    with pytest.raises(PatchError, match="needs a pipeline"), BASELINES[name](unet):
        pass


def test_fewer_steps_are_a_run_of_fewer_steps(pipe: Any) -> None:
    with BASELINES["fewer-steps"](pipe, num_inference_steps=3):
        found = latents(pipe, steps=6)
    assert torch.equal(found, latents(pipe, steps=3))
    assert not torch.equal(found, latents(pipe, steps=4))


@pytest.mark.parametrize(
    ("name", "settings", "degree", "limit"),
    [
        ("taylorseer", {"order": 0}, 0, 1e-6),
        ("taylorseer", {"order": 1}, 1, 1e-6),
        ("taylorseer", {"order": 2}, 2, 1e-6),
        ("spectrum", {"degree": 2, "ridge": 1e-9}, 2, 1e-4),
    ],
)
def test_outputs_are_continued(
    pipe: Any, name: str, settings: dict[str, Any], degree: int, limit: float
) -> None:
    """Outputs that are polynomials of the step are forecast exactly; of a higher degree, not."""
    steps = torch.arange(12.0)

    def error(power: int) -> float:
        made: list[int] = []

        def forward(*_: Any, **__: Any) -> tuple[torch.Tensor]:
            return (steps[made[-1]] ** power + torch.zeros(1),)

        pipe.unet.forward = forward
        found = []
        with BASELINES[name](pipe, interval=3, **settings):
            pipe.scheduler.set_timesteps(12)
            for step in range(12):
                made.append(step)
                found.append(float(pipe.unet(None, 0, None, return_dict=False)[0]))
        del pipe.unet.forward
        return float((torch.tensor(found) - steps**power).abs().max() / steps.max() ** power)

    assert error(degree) < limit
    assert error(degree + 1) > 100 * limit
