"""Every scheduler of diffusers that a Stable Diffusion pipeline takes, and runs cut otherwise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from reversal import check_likeness
from sampling import sample_if
from scheduler_cases import NAMES, given, seeded
from tiny_models import for_tiny, latents, smallest_unet, tiny_pipeline, watch
from tiny_pipelines import PICTURE, of, refiner, xl

from agentsd import Schedule, SettingsError, apply_patch
from agentsd.generation.images import make_batch
from agentsd.generation.prompt_encoding import PromptEncoder
from agentsd.image_settings import ImageSettings
from agentsd.methods import Keys, Merge
from agentsd.models.schedulers import scheduler_for

TWO = for_tiny(Schedule(phases=[Keys(until=0.5), Merge()]))


NOTES = {
    "DPMSolverSDEScheduler": "agentsd's commands and page feed it each image's seed; in code of "
    "your own, set `pipe.scheduler.noise_sampler_seed` to the list of seeds"
}
SCHEDULERS = [
    pytest.param(
        name,
        marks=(
            pytest.mark.cell("Schedulers", name=name, note=NOTES.get(name, "")),
            *sample_if(name in ("DDIMScheduler", "HeunDiscreteScheduler")),
        ),
    )
    for name in NAMES
]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_phase_changes_at_the_right_step(pipe: Any, name: str) -> None:
    seeded(given(pipe, name))
    plain = latents(pipe, steps=6)
    assert torch.isfinite(plain).all()
    apply_patch(pipe, TWO, max_downsample=2)
    seen = watch(pipe.unet)
    patched = latents(pipe, steps=6)
    check_likeness(patched, plain)
    assert not torch.equal(patched, plain)
    steps = [(step.position.step, step.phase.method) for step in seen]
    assert steps == sorted(steps)
    assert {method for step, method in steps if step < 3} == {"keys"}
    assert {method for step, method in steps if step >= 3} == {"merge"}
    assert {step for step, _ in steps} == set(range(6))


def test_a_scheduler_whose_package_is_missing(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise ImportError("\nDDPMScheduler requires the x library but it was not found")

    monkeypatch.setattr(DDPMScheduler, "from_config", missing)
    with pytest.raises(SettingsError, match=r"^scheduler: DDPMScheduler requires the x library"):
        scheduler_for(pipe, "DDPM")


Make = Callable[[Sequence[int]], list[Any]]
"""Makes images from seeds; ``[H, W, 3]`` in [0, 1] each."""


def faults(make: Make) -> set[str]:
    """What is wrong with how images depend on their seeds."""
    before = torch.get_rng_state()
    together, again, (alone,) = make([3, 4]), make([3, 4]), make([4])
    found = {
        "global state": not torch.equal(before, torch.get_rng_state()),
        "twice": not all(map(np.array_equal, together, again)),
        # Kernels differ in their last bits between sizes of a batch.
        "batch": abs(together[1] - alone).max() > 0.01,
        "seed": abs(together[0] - together[1]).max() < 0.05,
    }
    return {fault for fault, there in found.items() if there}


def ours(pipe: Any) -> Make:
    def make(seeds: Sequence[int]) -> list[Any]:
        settings = {"prompt": "a", "num_inference_steps": 3, "height": 64, "width": 64}
        batch = [ImageSettings(seed=seed, **settings) for seed in seeds]
        return [drawn.pixels for drawn in make_batch(pipe, batch, PromptEncoder(pipe))]

    return make


def diffusers_own(pipe: Any) -> Make:
    def make(seeds: Sequence[int]) -> list[Any]:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        arguments = {"generator": generators, "num_inference_steps": 3, "output_type": "np"}
        return list(pipe(["a"] * len(seeds), height=64, width=64, **arguments).images)

    return make


@pytest.fixture
def small(tmp_path: Path) -> Any:
    return tiny_pipeline(tmp_path, smallest_unet())


@pytest.mark.parametrize("name", SCHEDULERS)
def test_seeds_and_nothing_else_decide(small: Any, name: str) -> None:
    assert faults(ours(given(small, name))) == set()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("DPMSolverSinglestepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("DPMSolverSDEScheduler", {"noise_sampler_seed": 7}),
        ("DPMSolverSDEScheduler", {"use_karras_sigmas": True}),
        ("SASolverScheduler", {}),
        ("LCMScheduler", {}),
        ("TCDScheduler", {}),
        ("EDMDPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("CosineDPMSolverMultistepScheduler", {}),
        ("CMStochasticIterativeScheduler", {}),
        ("DDPMParallelScheduler", {}),
        ("IPNDMScheduler", {}),
    ],
)
def test_seeds_decide_with_what_a_model_may_bring(
    small: Any, kind: str, config: dict[str, Any]
) -> None:
    try:
        small.scheduler = getattr(diffusers, kind).from_config(small.scheduler.config, **config)
    except (AttributeError, ImportError) as error:  # an old diffusers; torchsde, SciPy
        pytest.skip(str(error).strip())
    own = vars(small.scheduler).get("noise_sampler_seed")
    assert faults(ours(small)) == set()
    assert "step" not in vars(small.scheduler)
    assert vars(small.scheduler).get("noise_sampler_seed") == own


class Heedless(DDIMScheduler):
    """Draws from PyTorch's global random state, at its second step."""

    def step(self, output: Any, timestep: Any, sample: Any, **_: Any) -> Any:
        found = super().step(output, timestep, sample)[0]
        return (found + torch.randn_like(found) if timestep < 400 else found,)


class First(DDIMScheduler):
    """Draws for all images of a batch from the generator of the first."""

    def step(self, output: Any, timestep: Any, sample: Any, generator: Any, **_: Any) -> Any:
        found = super().step(output, timestep, sample)[0]
        first = generator[0] if isinstance(generator, list) else generator
        return (found + torch.randn(found.shape, generator=first),)


@pytest.mark.slow
def test_the_check_of_seeds_can_fail(small: Any) -> None:
    assert faults(diffusers_own(small)) == set()
    assert faults(lambda seeds: ours(small)([3] * len(seeds))) == {"seed"}
    small.scheduler = First.from_config(small.scheduler.config)
    assert faults(diffusers_own(small)) == {"batch"}
    small.scheduler = Heedless.from_config(small.scheduler.config)
    assert faults(diffusers_own(small)) == {"global state", "twice", "batch"}


@pytest.mark.slow
def test_diffusers_own_noise_does_not_depend_on_seeds(small: Any) -> None:
    """Or else the row of the page needs its note no longer."""
    given(small, "DPMSolverSDEScheduler")
    assert faults(diffusers_own(small)) == {"global state", "twice", "batch"}


def test_a_scheduler_that_seeds_cannot_feed_is_refused(small: Any) -> None:
    small.scheduler = Heedless.from_config(small.scheduler.config)
    before = torch.get_rng_state()
    with pytest.raises(SettingsError, match="Heedless draws noise from PyTorch's global random"):
        ours(small)([3])
    assert torch.equal(before, torch.get_rng_state())
    assert "step" not in vars(small.scheduler)


OWN = "Runs cut otherwise"
TIMESTEPS = [999, 800, 700, 400, 200, 50]


def methods(seen: list[Any]) -> list[tuple[int, str]]:
    """Step and method of each call of the UNet."""
    return [(step.position.step, step.phase.method) for step in seen]


@pytest.mark.cell(OWN)
@pytest.mark.parametrize(
    ("name", "given"),
    [
        pytest.param("DDPM", {"timesteps": TIMESTEPS}, id="custom timesteps, DDPM"),
        pytest.param("DPM++ 2M", {"timesteps": TIMESTEPS}, id="custom timesteps, DPM++ 2M"),
        pytest.param("Euler", {"timesteps": TIMESTEPS}, id="custom timesteps, Euler"),
        pytest.param("Euler", {"sigmas": [14, 6, 3, 1.5, 0.6, 0.1, 0]}, id="custom sigmas, Euler"),
    ],
)
def test_steps_of_the_users_own(pipe: Any, name: str, given: dict[str, Any]) -> None:
    """Phases go by the number of steps asked for, wherever these lie."""
    pipe.scheduler = scheduler_for(pipe, name)
    plain = latents(pipe, **given)
    seen = watch(apply_patch(pipe, TWO, max_downsample=2).unet)
    patched = latents(pipe, **given)
    check_likeness(patched, plain)
    assert not torch.equal(patched, plain)
    assert methods(seen) == [(i, "keys" if i < 3 else "merge") for i in range(6)]


@pytest.mark.cell(OWN, name="strength below 1")
def test_a_run_that_starts_in_its_middle(tmp_path: Path) -> None:
    """The phases are those of the whole run: img2img does only its end."""
    pipe = of("StableDiffusionImg2ImgPipeline", tmp_path)
    seen = watch(apply_patch(pipe, TWO, max_downsample=2).unet)
    pipe("a cat", image=PICTURE, strength=0.7, num_inference_steps=10, output_type="latent")
    assert methods(seen) == [(i, "keys" if i < 5 else "merge") for i in range(3, 10)]


@pytest.mark.cell(OWN, name="SDXL base and refiner, denoising_end and denoising_start")
def test_the_refiner_goes_on_where_the_base_ends(tmp_path: Path) -> None:
    """A schedule spans both: the refiner's first step is the one after the base's last."""
    base, (after, _) = xl(tmp_path), refiner(tmp_path)
    after.scheduler = type(base.scheduler).from_config(base.scheduler.config)
    short = for_tiny(Schedule(phases=[Keys(until=0.8), Merge()]))
    split, steps = 0.6, {"num_inference_steps": 10, "output_type": "latent"}
    seen = [watch(apply_patch(pipe, short, max_downsample=4).unet) for pipe in (base, after)]
    noisy = base("a cat", height=32, width=32, denoising_end=split, **steps).images
    made = after("a cat", image=noisy, denoising_start=split, **steps).images
    assert torch.isfinite(made).all()
    found = methods(seen[0]), methods(seen[1])
    assert all(found)
    assert [*found[0], *found[1]] == [(i, "keys" if i < 8 else "merge") for i in range(10)]
