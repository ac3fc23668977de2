"""Prepares what the layers need to know about each call of a UNet."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..methods.agent import Agent
from ..methods.base import Draw
from ..methods.full import Full
from ..methods.tensor_cache import TensorCache
from ..schedule import Phase, Plan, Schedule
from .denoising_step import Position
from .light_steps import LightSteps, without_deep_residuals
from .step_policy import StepPolicy

MIN_TOKENS = {"cpu": 512, "cuda": 2048, "mps": 2048}
"""Layers with fewer tokens are left unpatched, by kind of device; other kinds count as CUDA.

On a CPU, no method was slower with at least 512 tokens, at any width from 32 to 1,280 channels, or
with at least 256 tokens from 320 channels on. The other numbers are guesses, not yet measured.
"""

UNTOUCHED = Full()

INPUTS = ("sample", "timestep", "encoder_hidden_states", *map(str, range(3, 16)))
"""Names of a UNet's positional arguments; from the fourth on, just their numbers."""


@dataclass(frozen=True)
class StepPlan:
    """What one call of the UNet does: its place in the run, its phase, and the layers' plans."""

    position: Position
    phase: Phase
    plans: dict[int, Plan]
    """The phase's plan for each resolution (``downsample``)."""
    chosen: dict[tuple[int, int], Tensor]
    """By resolution and number of heads: the tokens chosen as destinations ``[cells]``, or as keys
    ``[heads, cells]``."""
    works: frozenset[int]
    """The resolutions at which layers do not behave as if unpatched."""
    forecast: Tensor | None = None
    """The deep feature that a light step starts from; None for a whole step."""


@dataclass
class StepState:
    """What the layers of one call share."""

    owners: dict[int, Tensor] = field(default_factory=dict)
    """By layer number: the owners of the layer's tokens, for the rest of its block."""


class Runtime:
    """Follows the calls of one UNet.

    Args:
        schedule: What each step does.
        layers: Resolution (``downsample``) and number of heads of the patched layers.
            ``max_downsample=None`` means the highest resolution among them.
        policy: Decides which step a call belongs to, and whether it is light.
        device: Kind of device that steps are planned for without running there, as when FLOPs are
            counted, which warns of nothing; by default that of the latents.
    """

    def __init__(
        self,
        schedule: Schedule,
        layers: Iterable[tuple[int, int]],
        policy: StepPolicy,
        device: str | None = None,
    ) -> None:
        self.schedule, self.policy, self.device = schedule, policy, device
        self.layers = frozenset(layers)
        self.step: StepPlan | None = None
        """The current call; None between calls."""
        self.state = StepState()
        self.light_steps: LightSteps | None = None
        """Makes calls light; None if the schedule has no cache."""
        self._chosen = TensorCache()
        self._sizes: set[tuple[int, int]] = set()
        self._warned_of_mask = False

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"step": None, "state": StepState()}

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # PyTorch has no types for it
    def follow(
        self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Read the step and the size of the latents from a call; a forward pre-hook of the UNet.

        Everything that depends on the step is computed here, before the layers run and outside
        the compiled graph. A compiled UNet then sees only tensors and constants of the phase, and
        is compiled once per phase instead of at each step.

        Raises:
            ScheduleError: If a phase ends at a step number but the steps are unknown.
        """
        self.step, self.state = None, StepState()
        inputs = dict(zip(INPUTS, args, strict=False)) | kwargs
        decision = self.policy.decide(unet, inputs)
        sample, phase = inputs["sample"], decision.phase
        height, width = sample.shape[-2:]
        step = self.step_at(decision.position, phase, height, width, sample)
        if self.device is None and (height, width) not in self._sizes:
            self._sizes.add((height, width))
            self._warn_if_idle(height, width, sample.device.type)
            self._warn_of_no_agents(height, width, sample.device.type)
        if kwargs.get("attention_mask") is not None and not self._warned_of_mask:
            self._warned_of_mask = True
            warnings.warn(
                "agentsd leaves calls with an attention_mask unpatched: the mask refers to tokens "
                "that merging would remove",
                stacklevel=2,
            )
        self.step = replace(step, forecast=decision.forecast)
        if self.light_steps is not None and phase.cache is not None:
            if decision.forecast is not None:
                self.light_steps.stand_in(phase.cache.branch, decision.forecast)
                return args, without_deep_residuals(kwargs, phase.cache.branch)
            if decision.records:
                self.light_steps.record(phase.cache.branch)
        return None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def finish(self, _: nn.Module, __: Any, output: Any) -> None:
        """Keep what later calls need, and drop the rest; a forward hook.

        It is also called, without an output, if the call raised an error.
        """
        feature = self.stop()
        if output is not None:
            self.policy.finish(feature)

    def stop(self) -> Tensor | None:
        """End a call, failed or not: until the next one, the UNet behaves as if unpatched.

        Returns:
            The deep feature that the call recorded, if any.
        """
        self.step, self.state = None, StepState()
        return None if self.light_steps is None else self.light_steps.finish()

    def _warn_if_idle(self, height: int, width: int, device: str) -> None:
        """Warn if the schedule would change layers, but changes none at this size."""
        phases = [phase for phase in self.schedule.phases if not isinstance(phase, Full)]
        plans = [self.plan(p, d, height, width, device) for p in phases for d, _ in self.layers]
        if not phases or not all(plan.untouched for plan in plans):
            return
        if any(self.covers(p, d, height, width, device) for p in phases for d, _ in self.layers):
            why = "it would merge no tokens, and use as many agents or keys as there are tokens"
        else:
            fewest = max(self._min_tokens(phase, device) for phase in phases)
            why = f"layers of fewer than {fewest:,} tokens gain nothing on {device} (min_tokens)"
        warnings.warn(
            f"this agentsd schedule changes nothing on latents of {height}×{width}: {why}; "
            "inspect_patch shows what each layer does",
            stacklevel=2,
        )

    def _warn_of_no_agents(self, height: int, width: int, device: str) -> None:
        """Warn of phases that should use agents, but only merge tokens at this size."""
        for phase in (phase for phase in self.schedule.phases if isinstance(phase, Agent)):
            plans = [self.plan(phase, d, height, width, device) for d, _ in self.layers]
            merging = [plan for plan in plans if not plan.untouched]
            if merging and not any(plan.agents for plan in merging):
                warnings.warn(
                    f"agentsd only merges tokens on latents of {height}×{width}, without agents: "
                    "there would be at least half as many as merged tokens; for fewer agents, "
                    "raise agent_ratio, sx or sy",
                    stacklevel=2,
                )

    def step_at(
        self,
        position: Position,
        phase: Phase,
        height: int,
        width: int,
        sample: Tensor | None = None,
    ) -> StepPlan:
        """Prepare a step on latents of ``height × width``.

        Args:
            position: The step's position in its run.
            phase: The step's phase.
            height: Height of the latents.
            width: Width of the latents.
            sample: A tensor on the device that the UNet runs on; by default the CPU.
        """
        sample = torch.empty(0) if sample is None else sample
        kind = self.device or sample.device.type
        plans = {d: self.plan(phase, d, height, width, kind) for d, _ in self.layers}
        works = frozenset(d for d, plan in plans.items() if not plan.untouched)
        chosen = {
            (d, heads): self._choose(position, phase, heads, _grid(d, height, width), sample)
            for d, heads in self.layers
            if d in works
        }
        return StepPlan(position, phase, plans, chosen, works)

    def _choose(
        self, position: Position, phase: Phase, heads: int, grid: tuple[int, int], sample: Tensor
    ) -> Tensor:
        """The tokens that a step chooses on a grid, cached."""
        period = phase.period(*grid) if position.listed else None
        step = position.step % period if period else position.step
        # MPS supports 64-bit integers incompletely; tokens drawn only once can come from the CPU.
        device = torch.device("cpu") if sample.device.type == "mps" else sample.device
        draw = Draw(step, position.listed, self.schedule.seed, device)
        return self._chosen.get(_chosen, phase, draw, heads, *grid, sample.device, like=sample)

    def plan(self, phase: Phase, downsample: int, height: int, width: int, device: str) -> Plan:
        """A phase's plan at a resolution, on latents of ``height × width``."""
        covered = self.covers(phase, downsample, height, width, device)
        return (phase if covered else UNTOUCHED).plan(*_grid(downsample, height, width))

    def covers(self, phase: Phase, downsample: int, height: int, width: int, device: str) -> bool:
        """Whether the phase patches a resolution, given ``max_downsample`` and ``min_tokens``."""
        reach = phase.max_downsample or min(d for d, _ in self.layers)
        rows, columns = _grid(downsample, height, width)
        return downsample <= reach and rows * columns >= self._min_tokens(phase, device)

    def _min_tokens(self, phase: Phase, device: str) -> int:
        """Number of tokens from which layers are patched."""
        default = MIN_TOKENS.get(device, MIN_TOKENS["cuda"])
        return default if phase.min_tokens is None else phase.min_tokens


def _chosen(
    phase: Phase, draw: Draw, heads: int, height: int, width: int, device: torch.device
) -> Tensor:
    chosen = phase.choose(draw, heads, height, width)
    return chosen.to(device) if device.type == "mps" else chosen


def _grid(downsample: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of tokens at a resolution, rounded up as in the UNet."""
    return -(-height // downsample), -(-width // downsample)
