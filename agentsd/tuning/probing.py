"""Single calls of a UNet, each as a whole or light step of any candidate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ..patching.deep_features import without_deep_residuals
from ..patching.patch import apply_patch, install, patch_of, remove_patch
from ..patching.still_runtime import StillRuntime
from ..schedule import Schedule
from .candidates import ATTENTION, CACHES
from .trajectories import UNetCall, moved

OUTPUT = -1
"""The branch that forecasts the output; its light steps call nothing."""

BRANCHES = sorted({cache.get("cache_branch", OUTPUT) for cache in CACHES} - {OUTPUT})


class Probe:
    """Calls a UNet with the arguments of a recorded call; see :func:`probing`."""

    def __init__(
        self, pipe: DiffusionPipeline, runtime: StillRuntime, check: Callable[[], None]
    ) -> None:
        self._pipe, self._runtime, self._check = pipe, runtime, check

    def whole(self, call: UNetCall, attention: int, branch: int) -> tuple[Tensor, Tensor]:
        """The output and the deep feature of a whole step, on the CPU."""
        output, features = self._call(call, attention, branch, None)
        return output, features["deep"].cpu()

    def light(self, call: UNetCall, attention: int, branch: int, feature: Tensor) -> Tensor:
        """The output of a light step that builds on a feature, on the CPU."""
        return self._call(call, attention, branch, feature)[0]

    def _call(
        self, call: UNetCall, attention: int, branch: int, feature: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        self._check()
        runtime, device = self._runtime, self._pipe._execution_device
        phase = runtime.schedule.phases[attention * len(BRANCHES) + BRANCHES.index(branch)]
        arguments = moved(call.arguments, device) | {"return_dict": False}
        height, width = call.latents.shape[-2:]
        step = runtime.step_at(call.position, phase, height, width, arguments["sample"])
        if feature is None:
            runtime.step = replace(step, records=branch)
        else:
            runtime.step = replace(step, forecast=feature.to(device))
            arguments = without_deep_residuals(arguments, branch)
        with torch.inference_mode():
            output: Tensor = self._pipe.unet(**arguments)[0].cpu()
        return output, runtime.step.features


@contextmanager
def probing(pipe: DiffusionPipeline, check: Callable[[], None]) -> Iterator[Probe]:
    """Let a UNet be called step by step, until the end of the ``with`` block.

    Args:
        pipe: Unpatched, and again so afterwards.
        check: Called before each call; may raise to stop.
    """
    kinds = [
        attention | {"cache_interval": 2, "cache_branch": branch}
        for attention in ATTENTION
        for branch in BRANCHES
    ]
    ends = [{"until_step": number} for number in range(1, len(kinds))]
    phases = [kind | end for kind, end in zip(kinds, [*ends, {}], strict=True)]
    schedule = Schedule.from_dict({"phases": phases})
    patch = patch_of(apply_patch(pipe, schedule).unet)
    assert patch is not None
    remove_patch(pipe)
    runtime = StillRuntime(schedule, patch.runtime.layers)
    try:
        install(pipe.unet, runtime)
        yield Probe(pipe, runtime, check)
    finally:
        remove_patch(pipe)
