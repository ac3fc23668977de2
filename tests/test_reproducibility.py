"""An image depends on its prompt and seed alone, and nothing random of the user's is touched."""

from __future__ import annotations

import random
from itertools import product
from typing import Any

import pytest
import torch
from sampling import with_samples
from tiny_models import call, latents
from torch import Tensor

from agentsd import apply_patch, patched, remove_patch
from agentsd.methods import Full, Keys
from agentsd.schedule import Schedule

LIMIT = 1e-4
"""Relative L2 between batch sizes, in float32 on the CPU: its kernels sum in another order."""

METHODS: dict[str, dict[str, Any]] = {
    "agent": {"sx": 4, "sy": 4, "ratio": 0.4, "agent_ratio": 0.95, "max_downsample": 2},
    "merge": {"method": "merge", "max_downsample": 2},
    "keys grid": {"method": "keys", "select": "grid"},
    "keys random": {"method": "keys", "select": "random"},
    "keys cycle": {"method": "keys", "select": "cycle"},
}
PROMPTS = ["a cat", "two red boats", "the sea"]


def schedule_of(method: str) -> Schedule:
    return Schedule(phases=[METHODS[method] | {"min_tokens": 0}], seed=5)


@pytest.fixture(params=with_samples(METHODS, "agent", "keys cycle"))
def schedule(request: pytest.FixtureRequest) -> Schedule:
    return schedule_of(request.param)


def check_same(found: Tensor, expected: Tensor) -> None:
    """Each image is the same one."""
    distance = (found - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert distance.max() <= LIMIT, f"an image moved by {float(distance.max()):.1e}"


@pytest.mark.slow
def test_batch_mates_do_not_matter(pipe: Any, schedule: Schedule) -> None:
    apply_patch(pipe, schedule)
    together = latents(pipe, prompt=PROMPTS)
    pairs = latents(pipe, prompt=PROMPTS[:2])
    check_same(pairs, together[:2])
    for seed, prompt in enumerate(PROMPTS):
        alone = latents(pipe, prompt=[prompt], seeds=[seed])
        check_same(alone, together[seed : seed + 1])
    with pytest.raises(AssertionError, match="an image moved"):
        check_same(together.roll(1, 0), together)
    if (
        getattr(schedule.phases[0], "select", None) != "grid"
    ):  # the draws of another schedule do move an image
        apply_patch(pipe, Schedule(phases=schedule.phases, seed=6))
        with pytest.raises(AssertionError, match="an image moved"):
            check_same(latents(pipe, prompt=PROMPTS), together)
    remove_patch(pipe)
    with pytest.raises(AssertionError, match="an image moved"):
        check_same(latents(pipe, prompt=PROMPTS), together)


@pytest.mark.slow
def test_what_ran_before_does_not_matter(pipe: Any, schedule: Schedule) -> None:
    """Bit for bit: another size, schedule, number of steps, batch, or a run that raised."""
    apply_patch(pipe, schedule)
    expected = latents(pipe, 2)
    assert torch.equal(latents(pipe, 2), expected)
    latents(pipe, 2, size=(24, 40))
    assert torch.equal(latents(pipe, 2), expected), "another size"
    latents(pipe, steps=3, prompt=PROMPTS)
    assert torch.equal(latents(pipe, 2), expected), "another run"
    with patched(pipe, "paper", min_tokens=0):
        latents(pipe, steps=2)
    assert torch.equal(latents(pipe, 2), expected), "another schedule"
    with pytest.raises(ZeroDivisionError):
        latents(pipe, 2, callback_on_step_end=lambda *_: 1 / 0)
    assert torch.equal(latents(pipe, 2), expected), "a run that raised"


def test_guidance_halves_are_one_image(pipe: Any, schedule: Schedule) -> None:
    """Guidance doubles the batch; its two halves draw alike, so that scale 1 changes nothing."""
    apply_patch(pipe, schedule)
    check_same(
        latents(pipe, guidance_scale=1.0 + 1e-9, negative_prompt=[""]),
        latents(pipe, guidance_scale=1.0),
    )


def test_global_random_state_is_untouched(unet: Any, schedule: Schedule) -> None:
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    apply_patch(unet, schedule)
    call(unet, 500)
    call(unet, 100, size=(8, 12), batch=3)
    remove_patch(unet)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state
    if torch.cuda.is_available():
        now = torch.cuda.get_rng_state_all()
        assert all(torch.equal(*pair) for pair in zip(now, cuda_states, strict=True))


CALLS = [*product([(16, 16), (15, 13), (9, 16)], [1, 2, 3], [torch.float32, torch.bfloat16])]
"""Sizes, batches and types of calls."""

FEW = {((16, 16), 2, torch.float32), ((15, 13), 3, torch.bfloat16), ((9, 16), 1, torch.float32)}
"""Each of them at least once."""


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("size", "batch", "dtype"),
    [pytest.param(*each, marks=() if each in FEW else pytest.mark.slow) for each in CALLS],
)
def test_runs_at_any_size(
    unet: Any, method: str, size: tuple[int, int], batch: int, dtype: torch.dtype
) -> None:
    schedule = schedule_of(method)
    unet.to(dtype)
    unpatched = call(unet, size=size, batch=batch)
    apply_patch(unet, schedule)
    out = call(unet, size=size, batch=batch)
    assert out.shape == unpatched.shape
    assert out.dtype == dtype
    assert out.isfinite().all()
    assert not torch.equal(out, unpatched)


@pytest.mark.parametrize("method", ["agent", "merge"])
def test_a_side_shorter_than_the_cell_is_left_alone(unet: Any, method: str) -> None:
    unpatched = call(unet, size=(4, 16))
    apply_patch(unet, method=method, sx=2, sy=8, min_tokens=0)
    assert torch.equal(call(unet, size=(4, 16)), unpatched)
    assert not torch.equal(call(unet, size=(8, 16)), call(remove_patch(unet), size=(8, 16)))


def test_a_full_phase_is_the_unpatched_model(pipe: Any) -> None:
    """Bit for bit in its steps, and so in all of them where every phase is full."""
    expected = latents(pipe)
    apply_patch(pipe, Schedule(phases=[Full()]))
    assert torch.equal(latents(pipe), expected)
    apply_patch(pipe, Schedule(phases=[Full(until=0.5), Keys(min_tokens=0)]))
    assert not torch.equal(latents(pipe), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_draws_what_the_cpu_draws(unet: Any, schedule: Schedule) -> None:
    apply_patch(unet, schedule)
    on_cpu = call(unet.double())
    random_inputs = torch.Generator().manual_seed(1)
    sample = torch.randn(2, 4, 16, 16, generator=random_inputs).double().cuda()
    text = torch.randn(2, 7, 32, generator=random_inputs).double().cuda()
    with torch.no_grad():
        on_gpu = unet.cuda()(sample, 500, text).sample.cpu()
    check_same(on_gpu, on_cpu)
