"""What a call of the UNet leaves to the rest of a block, and never to another call or run."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, HeunDiscreteScheduler, PNDMScheduler
from tiny_models import call, latents, smallest_unet, tiny_pipeline

from agentsd import Schedule, ScheduleError, apply_patch, patched, remove_patch
from agentsd.methods import Agent, Keys

METHODS: dict[str, dict[str, Any]] = {
    "merge": {"method": "merge", "ratio": 0.5},
    "agent": {"method": "agent", "sx": 4, "sy": 4, "ratio": 0.4, "agent_ratio": 0.95},
    "keys": {"method": "keys"},
}


@pytest.fixture
def quick(tmp_path: Path) -> Any:
    """A pipeline whose UNet has one level and three self-attention layers."""
    return tiny_pipeline(tmp_path, smallest_unet())


@pytest.mark.parametrize(
    ("solver", "method"),
    [
        pytest.param(solver, method, marks=() if method in quick else pytest.mark.slow)
        for solver, quick in (
            (DDIMScheduler, METHODS),
            (PNDMScheduler, ["merge"]),
            (HeunDiscreteScheduler, ["agent"]),
        )
        for method in METHODS
    ],
)
def test_a_run_leaves_nothing_to_the_next(quick: Any, method: str, solver: Any) -> None:
    quick.scheduler = solver.from_config(quick.scheduler.config)
    apply_patch(quick, **METHODS[method], min_tokens=0)
    expected = latents(quick, 4, seeds=[7])

    def stop(_pipe: Any, step: int, _t: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            raise KeyboardInterrupt
        return inputs

    with pytest.raises(KeyboardInterrupt):
        latents(quick, 4, seeds=[8], callback_on_step_end=stop)
    assert torch.equal(latents(quick, 4, seeds=[7]), expected)
    latents(quick, 5, (48, 16), prompt=["a", "b"])
    assert torch.equal(latents(quick, 4, seeds=[7]), expected)


def test_guidance_in_two_calls_is_guidance_in_one(quick: Any) -> None:
    unet = apply_patch(quick, method="keys", min_tokens=0).unet
    scheduler = quick.scheduler
    scheduler.set_timesteps(4)
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    text = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        together = [unet(x, t, text).sample for t in scheduler.timesteps]
        apart = [
            torch.cat([unet(x[i : i + 1], t, text[i : i + 1]).sample for i in (0, 1)])
            for t in scheduler.timesteps
        ]
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("option", ["merge_crossattn", "merge_mlp"])
class TestRestOfTheBlock:
    def test_sees_merged_tokens_alone(self, unet: Any, option: str) -> None:
        part = {"merge_crossattn": "attn2", "merge_mlp": "ff"}[option]
        apply_patch(unet, method="merge", ratio=0.5, min_tokens=0, **{option: True})
        block = unet.down_blocks[0].attentions[0].transformer_blocks[0]
        seen = []
        inner = {"attn2": block.attn2.to_q, "ff": block.ff.net[0]}[part]
        inner.register_forward_hook(lambda _m, args, _out: seen.append(args[0].shape[1]))
        out = call(unet)
        assert seen == [128]
        with patched(unet, method="merge", ratio=0.5, min_tokens=0):
            assert not torch.equal(call(unet), out)

    def test_with_nothing_merged_is_the_model_as_it_is(self, unet: Any, option: str) -> None:
        before = call(unet)
        apply_patch(unet, method="merge", ratio=0.0, min_tokens=0, **{option: True})
        torch.testing.assert_close(call(unet), before, rtol=1e-4, atol=1e-5)

    def test_removal_restores_the_bits(self, unet: Any, option: str) -> None:
        before = call(unet)
        remove_patch(apply_patch(unet, method="merge", min_tokens=0, **{option: True}))
        assert torch.equal(call(unet), before)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in unet.modules())


class TestLeftAlone:
    def test_layers_of_few_tokens(self, unet: Any) -> None:
        before = call(unet)
        apply_patch(unet, method="keys", max_downsample=4, min_tokens=257)
        assert torch.equal(call(unet), before)
        apply_patch(unet, method="keys", max_downsample=4, min_tokens=256)
        assert not torch.equal(call(unet), before)

    def test_is_told_once_a_size(self, unet: Any) -> None:
        apply_patch(unet, method="keys", min_tokens=257)
        with pytest.warns(UserWarning, match="changes nothing on latents of 16×16"):
            call(unet)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            call(unet)
            call(unet, size=(16, 24))
            call(apply_patch(unet, method="full"))

    def test_by_kind_of_device(self, unet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        before = call(unet)
        apply_patch(unet, method="keys")
        monkeypatch.setattr("agentsd.patching.runtime.MIN_TOKENS", {"cpu": 257, "cuda": 0})
        assert torch.equal(call(unet), before)
        monkeypatch.setattr("agentsd.patching.runtime.MIN_TOKENS", {"cpu": 256, "cuda": 999})
        assert not torch.equal(call(unet), before)


class TestNumbers:
    @pytest.mark.parametrize(
        ("grid", "keys"),
        [((64, 64), 256), ((192, 192), 256), ((48, 96), 253), ((1, 300), 150), ((7, 9), 20)],
    )
    def test_keys_stay_below(self, grid: tuple[int, int], keys: int) -> None:
        plan = Keys(keys=256).plan(*grid)
        assert keys * 0.9 < plan.keys <= min(256, grid[0] * grid[1])

    @pytest.mark.parametrize("grid", [(64, 64), (128, 128), (192, 192), (96, 64), (40, 104)])
    def test_agents_stay_below(self, grid: tuple[int, int]) -> None:
        plan = Agent(agents=256, ratio=0.4).plan(*grid)
        assert 200 <= plan.agents <= 256

    def test_the_paper_s_early_phase(self) -> None:
        """256 agents on 64×64 tokens are what strides of 4 and a ratio of 0.95 make."""
        paper = Agent(sx=4, sy=4, ratio=0.4, agent_ratio=0.95)
        assert Agent(agents=256, ratio=0.4).plan(64, 64) == paper.plan(64, 64)

    @pytest.mark.parametrize(
        ("side", "keys"), [(16, 64), (32, 256), (64, 1024), (128, 1024), (192, 1024)]
    )
    def test_cells_grow_from_the_strides_given(self, side: int, keys: int) -> None:
        phase = Keys(keys=1024)
        assert phase.plan(side, side).keys == keys
        assert type(phase)(**phase.to_dict()) == phase
        assert Keys(sx=1, sy=1, keys=1024).plan(16, 16).untouched

    def test_agents_are_a_number_or_a_ratio(self) -> None:
        with pytest.raises(ScheduleError, match="drop agent_ratio"):
            Agent(agents=256, agent_ratio=0.9)
        phase = Agent(agents=256, sx=8, sy=8)
        assert [phase.plan(side, side).agents for side in (64, 128)] == [64, 256]

    def test_overrides(self) -> None:
        schedule = Schedule(phases=[Keys()]).override(keys=64)
        assert schedule.phases[0].plan(64, 64).keys == 64
        assert schedule.override(sx=16).phases[0].plan(64, 64).keys == 32
        agents = Agent(agents=256).override(agent_ratio=0.8)
        assert agents.agents is None
        assert agents.override(agents=64).to_dict().get("agent_ratio") is None
