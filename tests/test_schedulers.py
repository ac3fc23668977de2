"""Every scheduler of diffusers that a Stable Diffusion pipeline takes, by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from tiny_models import latents, watch

from agentsd import Phase, Schedule, apply_patch
from agentsd.extras import scheduler_for

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
