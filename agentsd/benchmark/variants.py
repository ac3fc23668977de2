"""The variants that are timed against each other, each a temporary change to a UNet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ..baselines import tiles, todo, tomesd
from ..methods.base import ENDS
from ..patching.denoising_step import locate
from ..patching.forecasts import features_used, forecast, whole_steps
from ..patching.layers import replaced_processors, top_attention_layers
from ..patching.patch import apply_schedule, patched, remove_patch
from ..patching.step_cache import Feature
from ..patching.step_policy import Decision
from ..schedule import Phase, Schedule

UNetPatch = Callable[[UNet2DConditionModel], AbstractContextManager[Any]]
"""Changes a UNet until the end of a ``with`` block."""


@contextmanager
def floor(unet: UNet2DConditionModel) -> Iterator[None]:
    """Skip self-attention at the highest resolution: no patch can be faster."""
    with replaced_processors(top_attention_layers(unet), lambda _: _Zeros()):
        yield


class _Zeros:
    """At module level, because a compiler treats each new class as new code."""

    def __call__(self, attn: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.zeros_like(hidden_states)


def variants_of(
    schedules: list[str], baselines: bool = True, **overrides: Any
) -> dict[str, UNetPatch]:
    """Unpatched, the floor, each phase of the schedules on its own, and the installed baselines.

    Whole and light steps of a phase with a cache are separate variants.

    Args:
        schedules: Names of presets or paths of YAML files.
        baselines: Also tomesd (PyPI), downsampled keys (the ToDo idea), tiles (the HyperTile idea).
        **overrides: Parameters to change in all schedules.

    Raises:
        ScheduleError: If a schedule cannot be read.
    """
    variants = dict(REFERENCES)
    for name in schedules:
        for phase, label in labels(name, **overrides).items():
            if phase.cache is None:
                variants[label] = _constant(phase)
            else:
                variants[f"{label}, whole"] = _constant(phase.without("cache"))
                variants[f"{label}, light"] = _light(phase)
    installed = {
        k: v for k, v in BASELINES.items() if not k.startswith("tomesd") or find_spec("tomesd")
    }
    return variants | installed if baselines else variants


def labels(name: str, **overrides: Any) -> dict[Phase, str]:
    """The phases of a schedule, each with the name of its variant."""
    schedule = Schedule.load(name)
    phases = (schedule.override(**overrides) if overrides else schedule).phases
    stem = Path(name).stem
    return {
        phase: stem + (f", phase {number}" if len(phases) > 1 else "")
        for number, phase in enumerate(phases, 1)
    }


def run_seconds(name: str, seconds: Mapping[str, float], num_steps: int) -> float:
    """The time of a whole run under a schedule, from the times of its variants.

    Args:
        name: The schedule.
        seconds: Of a call, by variant.
        num_steps: Denoising steps of the run.
    """
    schedule, variants = Schedule.load(name), labels(name)
    total = 0.0
    for step, whole in enumerate(whole_steps(schedule, num_steps)):
        phase = schedule.phase_at(step, num_steps)
        kind = "" if phase.cache is None else ", whole" if whole else ", light"
        total += seconds[variants[phase] + kind]
    return total


def _alone(phase: Phase) -> Schedule:
    return Schedule(phases=[phase.without(*ENDS)])


def _constant(phase: Phase) -> UNetPatch:
    return partial(patched, schedule=_alone(phase))


def _light(phase: Phase) -> UNetPatch:
    """A UNet whose calls are light steps, except for the first, which computes the feature."""
    schedule = _alone(phase)
    policy = _LightAfterFirst(schedule.phases[0])

    @contextmanager
    def patch(unet: UNet2DConditionModel) -> Iterator[None]:
        try:
            apply_schedule(unet, schedule, policy)
            yield
        finally:
            remove_patch(unet)

    return patch


class _LightAfterFirst:
    """Uses the feature of each shape's first call as the feature of all earlier steps."""

    def __init__(self, phase: Phase) -> None:
        self._phase, self._known = phase, dict[torch.Size, Tensor]()

    def decide(self, unet: nn.Module, inputs: Mapping[str, Any]) -> Decision:
        position, self._shape = locate(inputs["timestep"]), inputs["sample"].shape
        value = self._known.get(self._shape)
        if value is None:
            return Decision(position, self._phase, records=True)
        step = position.step
        assert self._phase.cache is not None
        before = range(step - features_used(self._phase.cache), step)
        known = [Feature(n, self._phase, value) for n in before]
        return Decision(position, self._phase, forecast(known, step).value)

    def finish(self, feature: Tensor | None) -> None:
        if feature is not None:
            self._known[self._shape] = feature


REFERENCES: dict[str, UNetPatch] = {"unpatched": lambda _: nullcontext(), "floor": floor}
"""Variants that the others are measured against."""

BASELINES: dict[str, UNetPatch] = {
    "tomesd 0.4": partial(tomesd, ratio=0.4),
    "tomesd 0.5": partial(tomesd, ratio=0.5),
    "ToDo, stride 2": partial(todo, stride=2),
    "tiles of 256": partial(tiles, side=16),
}
