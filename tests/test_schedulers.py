"""Every scheduler of diffusers that a Stable Diffusion pipeline takes, and runs cut otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from test_models import PICTURE, of, refiner, xl
from tiny_models import latents, watch

from agentsd import Phase, Schedule, apply_patch
from agentsd.models.schedulers import scheduler_for

pytestmark = pytest.mark.usefixtures("small_grids")

NAMES = sorted(kind.__name__ for kind in DDIMScheduler().compatibles)
TWO = Schedule(phases=[Phase(method="keys", until=0.5), Phase(method="merge")])


@pytest.mark.cell("Schedulers")
@pytest.mark.parametrize("name", NAMES)
def test_the_phase_changes_at_the_right_step(pipe: Any, name: str) -> None:
    try:
        pipe.scheduler = scheduler_for(pipe, name)
    except ImportError as error:  # torchsde, scipy: diffusers' own needs
        pytest.skip(str(error).strip())
    plain = latents(pipe, steps=6)
    assert torch.isfinite(plain).all()
    apply_patch(pipe, TWO, max_downsample=2)
    seen = watch(pipe.unet)
    patched = latents(pipe, steps=6)
    assert torch.isfinite(patched).all()
    assert not torch.equal(patched, plain)
    steps = [(step.position.step, step.phase.method) for step in seen]
    assert steps == sorted(steps)
    assert {method for step, method in steps if step < 3} == {"keys"}
    assert {method for step, method in steps if step >= 3} == {"merge"}
    assert {step for step, _ in steps} == set(range(6))


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
    assert torch.isfinite(patched).all()
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
    short = Schedule(phases=[Phase(method="keys", until=0.8), Phase(method="merge")])
    split, steps = 0.6, {"num_inference_steps": 10, "output_type": "latent"}
    seen = [watch(apply_patch(pipe, short, max_downsample=4).unet) for pipe in (base, after)]
    noisy = base("a cat", height=32, width=32, denoising_end=split, **steps).images
    made = after("a cat", image=noisy, denoising_start=split, **steps).images
    assert torch.isfinite(made).all()
    found = methods(seen[0]), methods(seen[1])
    assert all(found)
    assert [*found[0], *found[1]] == [(i, "keys" if i < 8 else "merge") for i in range(10)]
