"""What changes while a UNet runs: the step, its phase, the size of the latents.

Each call of the UNet says anew where in its run it stands: no calls are counted, and nothing is
kept from one call to the next.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ScheduleError
from ..methods.base import Draw
from ..methods.full import Full
from ..schedule import Phase, Plan, Schedule
from .deep_features import extrapolated, usable, without_deep_residuals
from .denoising_step import Call, Position, find_call, locate
from .step_cache import StepCache

MIN_TOKENS = {"cpu": 512, "cuda": 2048, "mps": 2048}
"""Layers of fewer tokens are left alone, by kind of device; where unlisted, as on CUDA.

On a CPU no method lost time from 512 tokens on, at any width from 32 to 1,280 channels; at widths
of 320 and more, none did from 256 on. On other devices these are guesses, not yet measured.
"""

UNTOUCHED = Full()


@dataclass(frozen=True)
class Step:
    """One call of the UNet: its place in the run, its phase, and what each layer needs of both."""

    position: Position
    phase: Phase
    plans: dict[int, Plan]
    """What the phase makes of the tokens, by resolution (``downsample``)."""
    chosen: dict[tuple[int, int], Tensor]
    """By resolution and number of heads: the tokens of the cells that serve as destinations
    ``[cells]``, or as keys ``[heads, cells]``."""
    works: frozenset[int]
    """The resolutions at which layers do anything but what they do unpatched."""
    owners: dict[int, Tensor]
    """By number of the layer: the owners of its tokens, for the rest of its block. Of this call."""
    forecast: Tensor | None = None
    """The deep feature that a light step builds on; None in a step that is computed whole."""
    records: int = 0
    """One more than the branch whose deep feature is to be kept; 0 keeps none."""
    features: dict[str, Tensor] = field(default_factory=dict)
    """The deep feature of this call."""


class Runtime:
    """Follows the calls of one UNet.

    Args:
        schedule: What each step does.
        layers: Resolution (``downsample``) and number of heads of the patched layers. The highest
            resolution among them is what ``max_downsample=None`` means.
        pipeline: The pipeline whose scheduler names the steps, or None for a UNet on its own.
    """

    def __init__(
        self, schedule: Schedule, layers: Iterable[tuple[int, int]], pipeline: Any = None
    ) -> None:
        self.schedule = schedule
        self.layers = frozenset(layers)
        # Weak, so that a UNet kept for itself does not keep its pipeline's other models. Asked
        # at every call, so that a scheduler swapped in later is the one that counts.
        self._pipeline: Callable[[], Any] = (
            weakref.ref(pipeline) if pipeline is not None else _nothing
        )
        self.step: Step | None = None
        self.cache = StepCache()
        self._sizes: set[tuple[int, int]] = set()
        self._told_of_mask = False

    def __getstate__(self) -> dict[str, Any]:
        """A pickle leaves the pipeline behind; timesteps still tell their list by themselves."""
        return vars(self) | {"_pipeline": _nothing, "step": None, "cache": StepCache()}

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # PyTorch has no types for it
    def follow(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Take step and size from a UNet's call; a forward pre-hook.

        All that depends on the step is made here, ahead of the layers and out of a compiler's
        sight. So a compiled UNet finds only constants of the phase, and tensors, and is compiled
        once a phase and not at each step.

        Raises:
            ScheduleError: If a phase ends at a number of steps and nothing tells the steps.
        """
        sample, timestep = (
            kwargs[name] if name in kwargs else args[place]
            for place, name in enumerate(("sample", "timestep"))
        )
        scheduler = getattr(self._pipeline(), "scheduler", None)
        call = find_call(timestep, scheduler)
        position = locate(timestep, scheduler, call)
        if self.schedule.counts_steps and not position.listed:
            raise ScheduleError(
                "until_step counts steps, but this UNet was called with a timestep that belongs "
                "to no scheduler's list; patch the pipeline rather than its UNet, or use until"
            )
        phase = self.schedule.phase_at(position.step, position.num_steps)
        height, width = sample.shape[-2:]
        self.step = self.step_at(position, phase, height, width, sample.device)
        if (height, width) not in self._sizes:
            self._sizes.add((height, width))
            self._tell_if_idle(height, width, sample.device.type)
        if kwargs.get("attention_mask") is not None and not self._told_of_mask:
            self._told_of_mask = True
            warnings.warn(
                "agentsd leaves calls with an attention_mask as they are unpatched: a mask names "
                "tokens, and merging takes them away",
                stacklevel=2,
            )
        if call is not None and phase.cache_interval > 1:
            self.step = self._with_cache(self.step, call, sample)
            if self.step.forecast is not None:
                return args, without_deep_residuals(kwargs, phase.cache_branch)
        return None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def finish(self, *_: Any) -> None:
        """Keep what a call leaves to later ones; a forward hook."""
        step = self.step
        if step is not None and step.features:
            self.cache.put(step.phase, step.features.pop("deep"))
        self.cache.end()

    def _with_cache(self, step: Step, call: Call, sample: Tensor) -> Step:
        """The step, made light if the features of earlier steps allow."""
        phase, now = step.phase, step.position.step
        self.cache.begin(call, now, sample)
        known = usable(self.cache.get(), phase, now)
        if not known:
            return replace(step, records=phase.cache_branch + 1)
        values = {float(feature.step): feature.value for feature in known}
        return replace(step, forecast=extrapolated(values, float(now)))

    def _tell_if_idle(self, height: int, width: int, device: str) -> None:
        """Warn where the schedule would change layers, but changes none of this size."""
        phases = [phase for phase in self.schedule.phases if not isinstance(phase, Full)]
        plans = [self.plan(p, d, height, width, device) for p in phases for d, _ in self.layers]
        if not phases or not all(plan.untouched for plan in plans):
            return
        if any(self.covers(p, d, height, width, device) for p in phases for d, _ in self.layers):
            why = "it merges nothing there, nor takes fewer agents or keys than there are tokens"
        else:
            least = max(self._least(phase, device) for phase in phases)
            why = f"layers of fewer than {least:,} tokens gain nothing on a {device} (min_tokens)"
        warnings.warn(
            f"this schedule of agentsd changes nothing on latents of {height}×{width}: {why}; "
            "inspect_patch tells what each layer does",
            stacklevel=2,
        )

    def step_at(
        self,
        position: Position,
        phase: Phase,
        height: int,
        width: int,
        device: torch.device | str = "cpu",
    ) -> Step:
        """A step on latents of ``height × width``."""
        device = torch.device(device)
        plans = {d: self.plan(phase, d, height, width, device.type) for d, _ in self.layers}
        works = frozenset(d for d, plan in plans.items() if not plan.untouched)
        draw = Draw(position.step, position.listed, self.schedule.seed, device)
        chosen = {
            (d, heads): phase.choose(draw, heads, *_grid(d, height, width))
            for d, heads in self.layers
            if not plans[d].untouched
        }
        return Step(position, phase, plans, chosen, works, {})

    def plan(self, phase: Phase, downsample: int, height: int, width: int, device: str) -> Plan:
        """What a phase makes of the tokens of a resolution, on latents of ``height × width``."""
        covered = self.covers(phase, downsample, height, width, device)
        return (phase if covered else UNTOUCHED).plan(*_grid(downsample, height, width))

    def covers(self, phase: Phase, downsample: int, height: int, width: int, device: str) -> bool:
        """Whether a resolution is neither too deep for the phase nor too small to gain."""
        reach = phase.max_downsample or min(d for d, _ in self.layers)
        rows, columns = _grid(downsample, height, width)
        return downsample <= reach and rows * columns >= self._least(phase, device)

    def _least(self, phase: Phase, device: str) -> int:
        """Tokens that a layer must have to be changed."""
        usual = MIN_TOKENS.get(device, MIN_TOKENS["cuda"])
        return usual if phase.min_tokens is None else phase.min_tokens


def _grid(downsample: int, height: int, width: int) -> tuple[int, int]:
    """Tokens down and across at a resolution; a halving rounds up, as the UNet's does."""
    return -(-height // downsample), -(-width // downsample)


def _nothing() -> None:
    return None
