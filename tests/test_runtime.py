"""Which step of its run a call of the UNet is, with real schedulers and pipelines."""

from __future__ import annotations

import gc
import weakref
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline
from sampling import with_samples
from scheduler_cases import SCHEDULERS, scheduler
from tiny_models import call, for_tiny, latents, smallest_unet, tiny_pipeline, watch
from torch import Tensor

from agentsd import ScheduleError, apply_patch
from agentsd.methods import Agent, Keys, Merge
from agentsd.patching.denoising_step import Position, locate
from agentsd.patching.runtime import StepPlan
from agentsd.schedule import Schedule


def two_phases(**end: float) -> Schedule:
    """Merging, then keys: the phase says which a step had."""
    return for_tiny(Schedule(phases=[Merge(**end), Keys()]))


def lengths(seen: list[StepPlan]) -> list[int]:
    """How many calls each phase had, one phase after the other."""
    return [len(list(calls)) for _, calls in groupby(step.phase.method for step in seen)]


def early(seen: list[StepPlan]) -> int:
    """How many calls had the first of :func:`two_phases`; they come first."""
    assert [step.phase.method for step in (seen[0], seen[-1])] == ["merge", "keys"]
    first, _ = lengths(seen)
    return first


@pytest.fixture
def quick(tmp_path: Path) -> Any:
    """A pipeline whose UNet has one level, for runs of many steps."""
    return tiny_pipeline(tmp_path, smallest_unet())


def run(pipe: Any, steps: int, **inputs: Any) -> Tensor:
    return latents(pipe, steps, (16, 16), guidance_scale=1.0, **inputs)


@pytest.mark.slow
@pytest.mark.parametrize("name", with_samples(SCHEDULERS, "PNDM", "Heun"))
def test_phases_of_50_steps(quick: Any, name: str) -> None:
    quick.scheduler = scheduler(name)
    phases = [
        Merge(until_step=20),
        Agent(until=0.6),
        Keys(),
    ]
    apply_patch(quick, for_tiny(Schedule(phases=phases)))
    seen = watch(quick.unet)
    run(quick, 50)
    assert lengths(seen) == SCHEDULERS[name][2]
    steps = [step.position.step for step in seen]
    assert steps == sorted(steps)
    assert set(steps) == set(range(50))
    assert {step.position.num_steps for step in seen} == {50}


@pytest.mark.parametrize(
    ("name", "end", "expected"),
    [
        ("DDIM", {"until": 0.4}, 8),
        ("DDIM", {"until_step": 5}, 5),
        ("DPM++ 2M Karras", {"until": 0.4}, 8),
        # A list longer than the steps: a share of the run is still that share of the calls.
        ("PNDM", {"until": 0.4}, 9),
        ("Heun", {"until": 0.4}, 16),
    ],
)
def test_unet_patched_for_itself_in_a_pipeline(
    quick: Any, name: str, end: dict[str, Any], expected: int
) -> None:
    quick.scheduler = scheduler(name)
    apply_patch(quick.unet, two_phases(**end))
    seen = watch(quick.unet)
    run(quick, 20)
    assert early(seen) == expected


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.slow
@pytest.mark.parametrize("num_steps", with_samples([1, 7, 30], 7))
def test_every_timestep_in_its_place(name: str, num_steps: int) -> None:
    """Without a run: each entry of the list, by itself and as a batch of it."""
    solver = scheduler(name)
    solver.set_timesteps(num_steps)
    views = list(solver.timesteps)
    steps = [locate(t, solver).step for t in views]
    assert steps == sorted(steps)
    assert set(steps) == set(range(num_steps))
    assert [locate(t.expand(3), solver).step for t in views] == steps
    assert [locate(t[None], solver).step for t in views] == steps


@pytest.mark.parametrize(
    ("name", "first"),
    # PNDM's list has its second timestep twice, so that its entry 10 is that of step 9.
    [("DDIM", 10), ("Heun", 10), ("PNDM", 9)],
)
@pytest.mark.parametrize("patch", ["itself", "the pipeline it came from"])
def test_img2img_begins_in_the_middle(quick: Any, name: str, first: int, patch: str) -> None:
    quick.scheduler = scheduler(name)
    second = StableDiffusionImg2ImgPipeline(**quick.components, requires_safety_checker=False)
    second.set_progress_bar_config(disable=True)
    apply_patch(second if patch == "itself" else quick, two_phases(until=0.7))
    seen = watch(quick.unet)
    generator = torch.Generator().manual_seed(0)
    second("a cat", image=torch.zeros(1, 3, 16, 16), strength=0.5, num_inference_steps=20,
           generator=generator, guidance_scale=1.0, output_type="latent")  # fmt: skip
    steps = [step.position.step for step in seen]
    assert steps[0] == first
    assert set(steps) == set(range(first, 20))
    assert early(seen) == sum(step < 14 for step in steps)


def test_scheduler_swapped_after_the_patch(quick: Any) -> None:
    apply_patch(quick, two_phases(until=0.4))
    seen = watch(quick.unet)
    for name, calls, first in (("DDIM", 10, 4), ("Heun", 19, 8), ("PNDM", 11, 5), ("LCM", 10, 4)):
        quick.scheduler = scheduler(name)
        seen.clear()
        run(quick, 10)
        assert (len(seen), early(seen)) == (calls, first), name


@pytest.mark.parametrize("name", ["DDIM", "Heun"])
def test_run_after_one_that_raised(quick: Any, name: str) -> None:
    quick.scheduler = scheduler(name)
    apply_patch(quick, two_phases(until_step=4))
    expected = run(quick, 8)

    def stop(_pipe: Any, step: int, _t: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            raise KeyboardInterrupt
        return inputs

    with pytest.raises(KeyboardInterrupt):
        run(quick, 8, callback_on_step_end=stop)
    seen = watch(quick.unet)
    assert torch.equal(run(quick, 8), expected)
    assert seen[0].position == Position(0, 8)


def test_pipeline_is_not_kept_alive(tmp_path: Path) -> None:
    """A UNet kept for itself lets go of the other models, and runs on."""
    pipe = tiny_pipeline(tmp_path, smallest_unet())
    unet = apply_patch(pipe, two_phases(until=0.4)).unet
    seen = watch(unet)
    solver, alive = pipe.scheduler, weakref.ref(pipe)
    del pipe
    gc.collect()
    assert alive() is None
    solver.set_timesteps(10)
    for t in solver.timesteps:
        call(unet, t)
    assert early(seen) == 4


class TestUNetOnItsOwn:
    @pytest.mark.parametrize(
        ("timestep", "method"),
        [
            (999, "merge"),
            (601, "merge"),
            (599.0, "keys"),
            (0, "keys"),
            (torch.tensor(980), "merge"),
            (torch.tensor([10, 10]), "keys"),
            (torch.tensor([900.0, 900.0]), "merge"),
            (torch.tensor([900]).expand(2), "merge"),
        ],
    )
    def test_level_of_noise_decides(self, timestep: Any, method: str) -> None:
        unet = apply_patch(smallest_unet(), two_phases(until=0.4))
        seen = watch(unet)
        call(unet, timestep)
        assert seen[0].phase.method == method
        assert not seen[0].position.listed

    @pytest.mark.parametrize("timestep", [999, torch.tensor(5), torch.tensor([5, 5])])
    def test_counted_steps_need_a_list(self, timestep: Any) -> None:
        unet = apply_patch(smallest_unet(), two_phases(until_step=3))
        with pytest.raises(ScheduleError, match="patch the pipeline rather than its UNet, or use"):
            call(unet, timestep)

    def test_arguments_by_name(self) -> None:
        unet = apply_patch(smallest_unet(), two_phases(until=0.4))
        seen = watch(unet)
        sample, text = torch.zeros(1, 4, 8, 6), torch.zeros(1, 7, 32)
        unet(sample=sample, timestep=999, encoder_hidden_states=text)
        unet(sample, encoder_hidden_states=text, timestep=0)
        assert [step.phase.method for step in seen] == ["merge", "keys"]
        assert [step.plans[1].tokens for step in seen] == [8 * 6] * 2


class TestLocate:
    @pytest.fixture
    def solver(self) -> Any:
        solver = DDIMScheduler(steps_offset=1)
        solver.set_timesteps(10)
        return solver

    @pytest.mark.parametrize("convert", [int, float, torch.clone, lambda t: torch.stack([t, t])])
    def test_by_value_where_a_pipeline_is_known(self, solver: Any, convert: Any) -> None:
        found = [locate(convert(t), solver) for t in solver.timesteps]
        assert found == [Position(i, 10) for i in range(10)]

    def test_by_value_of_another_list(self, solver: Any) -> None:
        assert locate(500, solver) == Position(499, 1000, listed=False)

    def test_loop_over_a_list_of_its_own(self) -> None:
        """No scheduler at all, but a tensor of timesteps that is walked through."""
        for i, t in enumerate(torch.linspace(999, 0, 8)):
            assert locate(t) == Position(i, 8)

    def test_list_cut_at_its_beginning(self, solver: Any) -> None:
        """As pipelines do that hand a half-made image on to a second model."""
        solver.timesteps, solver.num_inference_steps = solver.timesteps[4:], 6
        assert [locate(t, solver) for t in solver.timesteps] == [Position(i, 6) for i in range(6)]

    def test_ends_of_the_noise_scale(self) -> None:
        assert [locate(t).step for t in (5000, 999, 0, -3)] == [0, 0, 999, 999]

    def test_does_not_wait_for_the_device(
        self, solver: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The value of an entry of the list is never read."""
        views = list(solver.timesteps)

        def read(*_: Any) -> Any:
            raise AssertionError("the value was read")

        for name in ("item", "tolist", "__float__", "__int__", "__bool__", "__index__"):
            monkeypatch.setattr(Tensor, name, read)
        assert [locate(t, solver).step for t in views] == list(range(10))
        assert [locate(t).step for t in views] == list(range(10))
        with pytest.raises(AssertionError, match="was read"):
            locate(views[0].clone(), solver)


def test_size_of_each_call_counts(unet: Any) -> None:
    apply_patch(unet, method="merge", max_downsample=2, min_tokens=0)
    seen = watch(unet)
    sizes = [(16, 16), (8, 12), (9, 7), (16, 16)]
    outputs = [call(unet, size=size) for size in sizes]
    assert [step.plans[1].tokens for step in seen] == [256, 96, 63, 256]
    assert torch.equal(outputs[0], outputs[3])
    assert seen[2].plans[2].tokens == 5 * 4
