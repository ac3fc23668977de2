"""Each device: the same images twice, close to the CPU's, in half precision, without a wait.

`make gpu` runs these where there is a card. What does not need one is tried on the CPU, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from tiny_models import for_tiny, smallest_unet, tiny_unet
from torch import Tensor

from agentsd import Schedule, apply_patch, patched
from agentsd.benchmark.stopwatch import inputs_of

CUDA = pytest.param(
    "cuda",
    marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no such device: cuda"),
)
MPS = pytest.param(
    "mps",
    marks=pytest.mark.skipif(not torch.backends.mps.is_available(), reason="no such device: mps"),
)
DEVICES = ["cpu", CUDA, MPS]

AGENTS = {"method": "agent", "sx": 4, "sy": 4, "ratio": 0.4, "agent_ratio": 0.95}
SCHEDULES = {
    **{name: for_tiny(name) for name in Schedule.presets()},
    "agents": for_tiny(Schedule.from_dict({"phases": [AGENTS]})),
    "whole block": for_tiny(
        Schedule.from_dict(
            {"phases": [{"method": "merge", "merge_crossattn": True, "merge_mlp": True}]}
        )
    ),
}
STEPS = 6

each_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


def run(unet: Any, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """The outputs of a run's calls, each on latents of its own."""
    unet = unet.to(device, dtype)
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(STEPS, device=device)
    sample, text, more = inputs_of(unet, 2, 16, 16, torch.device(device), dtype)
    with torch.no_grad():
        outputs = [
            unet(sample * (1 + 0.1 * place), t, text, **more).sample.clone()
            for place, t in enumerate(scheduler.timesteps)
        ]
    return torch.stack(outputs).cpu()


@cache
def unpatched(device: str) -> Tensor:
    """The outputs of an unpatched run."""
    return run(tiny_unet(), device)


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative L2 distance."""
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm())


@each_schedule
@pytest.mark.parametrize("device", DEVICES)
def test_a_run_is_the_same_twice(device: str, schedule: Schedule) -> None:
    unet = apply_patch(tiny_unet(), schedule)
    first = run(unet, device)
    assert torch.equal(run(unet, device), first)
    assert not torch.equal(unpatched(device), first)


@pytest.mark.slow
@each_schedule
@pytest.mark.parametrize("device", [CUDA, MPS])
def test_a_run_is_the_cpus(device: str, schedule: Schedule) -> None:
    dtype = torch.float32 if device == "mps" else torch.float64
    unet = apply_patch(tiny_unet(), schedule)
    expected = run(unet, "cpu", dtype)
    found = run(unet, device, dtype)
    assert distance(found, expected) < 1e-3
    assert distance(run(tiny_unet(), device, dtype), expected) > 1e-3


@pytest.mark.slow
@each_schedule
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("device", DEVICES)
def test_half_precision_is_close_to_float32(
    device: str, dtype: torch.dtype, schedule: Schedule
) -> None:
    of_type = distance(run(tiny_unet(), device, dtype), unpatched(device))
    unet = apply_patch(tiny_unet(), schedule)
    expected = run(unet, device)
    found = run(unet, device, dtype)
    assert found.isfinite().all()
    # Rounding moves a token from one row to another, now and then.
    assert distance(found, expected) < 5 * of_type + 0.02
    assert distance(found.flip(0), expected) > 5 * of_type + 0.02


@contextmanager
def waits_are_errors() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_schedule
@pytest.mark.parametrize("device", [CUDA])
def test_no_call_waits_for_the_device(device: str, schedule: Schedule) -> None:
    unet = apply_patch(tiny_unet().to(device), schedule)
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(STEPS, device=device)
    sample, text, _ = inputs_of(unet, 2, 16, 16, torch.device(device), torch.float32)
    with torch.no_grad(), waits_are_errors():
        for t in [*scheduler.timesteps] * 2:
            unet(sample, t, text)
        with pytest.raises(RuntimeError, match="synchroniz"):
            sample.sum().item()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "name"),
    [("cpu", "turbo"), *(pytest.param("cuda", name, marks=CUDA.marks) for name in SCHEDULES)],
)
def test_compiled_as_cuda_graphs(device: str, name: str) -> None:
    """Graphs write over what they returned, which nothing that is kept may be."""
    torch._dynamo.reset()
    unet = apply_patch(smallest_unet(), SCHEDULES[name])
    eager = run(unet, device)
    how = {"mode": "reduce-overhead"} if device == "cuda" else {"backend": "eager"}
    unet.compile(**how)
    for _ in range(3):  # graphs are recorded at the second call
        compiled = run(unet, device)
    assert distance(compiled, eager) < 1e-3
    with patched(unet, SCHEDULES["paper" if name == "faithful" else "faithful"]):
        assert distance(run(unet, device), eager) > 1e-3
