"""Run single UNet calls, each as a whole or light step of any candidate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ..patching.light_steps import OUTPUT
from ..patching.patch import apply_schedule, remove_patch
from ..patching.step_policy import Decision, GivenSteps
from ..schedule import Schedule
from .candidates import ATTENTION, CACHES
from .trajectories import UNetCall, moved

BRANCHES: list[int] = sorted({cache.branch for cache in CACHES if cache is not None} - {OUTPUT})


class Probe:
    """Repeats recorded UNet calls; see :func:`probing`."""

    def __init__(
        self,
        pipe: DiffusionPipeline,
        schedule: Schedule,
        policy: GivenSteps,
        check: Callable[[], None],
    ) -> None:
        self._pipe, self._schedule = pipe, schedule
        self._policy, self._check = policy, check

    def whole(self, call: UNetCall, attention: int, branch: int) -> tuple[Tensor, Tensor]:
        """The output and the deep feature of a whole step, on the CPU."""
        output = self._call(call, attention, branch, None)
        feature = self._policy.feature
        assert feature is not None
        return output, feature.cpu()

    def light(self, call: UNetCall, attention: int, branch: int, feature: Tensor) -> Tensor:
        """The output of a light step that uses a cached feature, on the CPU."""
        return self._call(call, attention, branch, feature)

    def _call(self, call: UNetCall, attention: int, branch: int, feature: Tensor | None) -> Tensor:
        self._check()
        device = self._pipe._execution_device
        phase = self._schedule.phases[attention * len(BRANCHES) + BRANCHES.index(branch)]
        arguments = moved(call.arguments, device) | {"return_dict": False}
        known = None if feature is None else feature.to(device)
        self._policy.decision = Decision(call.position, phase, known, records=known is None)
        with torch.inference_mode():
            output: Tensor = self._pipe.unet(**arguments)[0].cpu()
        return output


@contextmanager
def probing(pipe: DiffusionPipeline, check: Callable[[], None]) -> Iterator[Probe]:
    """Run single steps of a UNet, until the end of the ``with`` block.

    Args:
        pipe: An unpatched pipeline; unpatched again afterwards.
        check: Called before each UNet call; may raise to stop.
    """
    kinds = [
        attention | {"cache": {"interval": 2, "branch": branch}}
        for attention in ATTENTION
        for branch in BRANCHES
    ]
    ends = [{"until_step": number} for number in range(1, len(kinds))]
    phases = [kind | end for kind, end in zip(kinds, [*ends, {}], strict=True)]
    schedule = Schedule.from_dict({"phases": phases})
    policy = GivenSteps()
    try:
        apply_schedule(pipe, schedule, policy)
        yield Probe(pipe, schedule, policy, check)
    finally:
        remove_patch(pipe)
