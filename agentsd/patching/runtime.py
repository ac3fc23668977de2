"""Follows the calls of a UNet: the step, its phase, the size of the latents.

Every call says where in its run it stands, so no calls are counted. What outlives a call is in
:mod:`agentsd.patching.step_cache`.
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
from ..methods.tensor_cache import TensorCache
from ..schedule import Phase, Plan, Schedule
from .deep_features import fewest_steps, forecast, has_light_steps, without_deep_residuals
from .denoising_step import Call, Position, find_call, position_of
from .step_cache import StepCache

MIN_TOKENS = {"cpu": 512, "cuda": 2048, "mps": 2048}
"""Layers with fewer tokens are left unpatched, by kind of device; other kinds count as CUDA.

On a CPU no method lost time with 512 tokens or more, at any width from 32 to 1,280 channels, nor,
from 320 channels on, with 256 or more. The numbers for other devices are guesses, not yet measured.
"""

UNTOUCHED = Full()


@dataclass(frozen=True)
class Step:
    """One call of the UNet: its place in the run, its phase, and what the layers need to know."""

    position: Position
    phase: Phase
    plans: dict[int, Plan]
    """The phase's plan for each resolution (``downsample``)."""
    chosen: dict[tuple[int, int], Tensor]
    """By resolution and number of heads: the tokens chosen as destinations ``[cells]``, or as keys
    ``[heads, cells]``."""
    works: frozenset[int]
    """The resolutions at which layers behave other than unpatched."""
    owners: dict[int, Tensor]
    """By number of the layer: the owners of its tokens in this call, for the rest of its block."""
    forecast: Tensor | None = None
    """The deep feature that a light step builds on; None if the step is computed whole."""
    records: int | None = None
    """The ``cache_branch`` whose feature is to be kept, if any."""
    features: dict[str, Tensor] = field(default_factory=dict)
    """The deep feature that this call computed, under ``"deep"``."""


class Runtime:
    """Follows the calls of one UNet.

    Args:
        schedule: What each step does.
        layers: Resolution (``downsample``) and number of heads of the patched layers.
            ``max_downsample=None`` stands for the highest resolution among them.
        pipeline: The pipeline whose scheduler lists the steps, or None for a UNet on its own.
    """

    def __init__(
        self, schedule: Schedule, layers: Iterable[tuple[int, int]], pipeline: Any = None
    ) -> None:
        self.schedule = schedule
        self.layers = frozenset(layers)
        # Weak, so that a UNet that is kept alone does not keep its pipeline's other models alive.
        # Looked up at every call, so that a scheduler swapped in later counts.
        self._pipeline: Callable[[], Any] = (
            weakref.ref(pipeline) if pipeline is not None else _nothing
        )
        self.step: Step | None = None
        self.cache = StepCache()
        self._chosen = TensorCache()
        self._sizes: set[tuple[int, int]] = set()
        self._short_runs: set[int] = set()
        self._warned_of_mask = False

    def __getstate__(self) -> dict[str, Any]:
        """A pickle leaves the pipeline and caches behind; timesteps still show their list."""
        caches = {"cache": StepCache(), "_chosen": TensorCache()}
        return vars(self) | {"_pipeline": _nothing, "step": None, **caches}

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # PyTorch has no types for it
    def follow(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Read the step and the size of the latents from a call; a forward pre-hook of the UNet.

        Whatever depends on the step is computed here, before the layers run and outside of the
        compiled graph. A compiled UNet then sees only tensors and constants of the phase, and is
        compiled once per phase instead of at each step.

        Raises:
            ScheduleError: If a phase ends at a number of steps but the steps are not known.
        """
        sample, timestep = (
            kwargs[name] if name in kwargs else args[place]
            for place, name in enumerate(("sample", "timestep"))
        )
        scheduler = getattr(self._pipeline(), "scheduler", None)
        call = find_call(timestep, scheduler)
        position = position_of(call, timestep, scheduler)
        if self.schedule.counts_steps and not position.listed:
            raise ScheduleError(
                "until_step counts steps, but this UNet was called with a timestep that belongs "
                "to no scheduler's list; patch the pipeline rather than its UNet, or use until"
            )
        phase = self.schedule.phase_at(position.step, position.num_steps)
        height, width = sample.shape[-2:]
        self.step = self.step_at(position, phase, height, width, sample)
        if (height, width) not in self._sizes:
            self._sizes.add((height, width))
            self._warn_if_idle(height, width, sample.device.type)
        if kwargs.get("attention_mask") is not None and not self._warned_of_mask:
            self._warned_of_mask = True
            warnings.warn(
                "agentsd leaves calls with an attention_mask unpatched: the mask refers to tokens "
                "that merging would remove",
                stacklevel=2,
            )
        if call is not None and has_light_steps(phase, position.num_steps):
            self.step = self._with_cache(self.step, call, sample)
            if self.step.forecast is not None:
                return args, without_deep_residuals(kwargs, phase.cache_branch)
        else:
            self.cache.clear()  # the next phase that has a cache begins anew
            if call is not None and phase.cache_interval > 1:
                self._warn_of_short_run(phase, position.num_steps)
        return None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def finish(self, *_: Any) -> None:
        """Keep what a call leaves to later ones, and nothing else; a forward hook."""
        if self.step is not None and self.step.features:
            self.cache.put(self.step.phase, self.step.features["deep"])
        self.cache.end()
        self.step = None

    def _with_cache(self, step: Step, call: Call, sample: Tensor) -> Step:
        """The step, made a light one if enough features of earlier steps are known."""
        phase, now = step.phase, step.position.step
        self.cache.begin(call, now, sample)
        found = forecast(self.cache.get(), phase, now, step.position.num_steps)
        if found is None:
            return replace(step, records=phase.cache_branch)
        return replace(step, forecast=found)

    def _warn_of_short_run(self, phase: Phase, num_steps: int) -> None:
        """Warn, once for each number of steps, that a run has no light steps."""
        if num_steps in self._short_runs:
            return
        self._short_runs.add(num_steps)
        warnings.warn(
            f"this run of {num_steps} steps computes each step whole: cache_interval "
            f"{phase.cache_interval} gains only in runs of {fewest_steps(phase)} steps or more",
            stacklevel=2,
        )

    def _warn_if_idle(self, height: int, width: int, device: str) -> None:
        """Warn if the schedule would change layers, but changes none at this size."""
        phases = [phase for phase in self.schedule.phases if not isinstance(phase, Full)]
        plans = [self.plan(p, d, height, width, device) for p in phases for d, _ in self.layers]
        if not phases or not all(plan.untouched for plan in plans):
            return
        if any(self.covers(p, d, height, width, device) for p in phases for d, _ in self.layers):
            why = "it would merge no tokens, and use as many agents or keys as there are tokens"
        else:
            least = max(self._least(phase, device) for phase in phases)
            why = f"layers of fewer than {least:,} tokens gain nothing on {device} (min_tokens)"
        warnings.warn(
            f"this agentsd schedule changes nothing on latents of {height}×{width}: {why}; "
            "inspect_patch shows what each layer does",
            stacklevel=2,
        )

    def step_at(
        self,
        position: Position,
        phase: Phase,
        height: int,
        width: int,
        sample: Tensor | None = None,
        kind: str | None = None,
    ) -> Step:
        """Prepare a step on latents of ``height × width``.

        Args:
            position: Where it is in its run.
            phase: Its phase.
            height: Of the latents.
            width: Likewise.
            sample: A tensor on the device that it runs on; by default on the CPU.
            kind: Kind of device that it is planned for; by default that of ``sample``.
        """
        sample = torch.empty(0) if sample is None else sample
        kind = kind or sample.device.type
        plans = {d: self.plan(phase, d, height, width, kind) for d, _ in self.layers}
        works = frozenset(d for d, plan in plans.items() if not plan.untouched)
        chosen = {
            (d, heads): self._choose(position, phase, heads, _grid(d, height, width), sample)
            for d, heads in self.layers
            if d in works
        }
        return Step(position, phase, plans, chosen, works, {})

    def _choose(
        self, position: Position, phase: Phase, heads: int, grid: tuple[int, int], sample: Tensor
    ) -> Tensor:
        """The tokens that a step chooses on a grid, drawn only when they first are needed."""
        period = phase.period(*grid) if position.listed else None
        step = position.step % period if period else position.step
        # 64-bit integers are incomplete on MPS; what is drawn once may as well come from the CPU.
        device = torch.device("cpu") if sample.device.type == "mps" else sample.device
        draw = Draw(step, position.listed, self.schedule.seed, device)
        return self._chosen.get(_chosen, phase, draw, heads, *grid, sample.device, like=sample)

    def plan(self, phase: Phase, downsample: int, height: int, width: int, device: str) -> Plan:
        """A phase's plan at a resolution, on latents of ``height × width``."""
        covered = self.covers(phase, downsample, height, width, device)
        return (phase if covered else UNTOUCHED).plan(*_grid(downsample, height, width))

    def covers(self, phase: Phase, downsample: int, height: int, width: int, device: str) -> bool:
        """Whether the phase patches a resolution: not too deep for it, nor too small to gain."""
        reach = phase.max_downsample or min(d for d, _ in self.layers)
        rows, columns = _grid(downsample, height, width)
        return downsample <= reach and rows * columns >= self._least(phase, device)

    def _least(self, phase: Phase, device: str) -> int:
        """Number of tokens from which layers are patched."""
        usual = MIN_TOKENS.get(device, MIN_TOKENS["cuda"])
        return usual if phase.min_tokens is None else phase.min_tokens


def _chosen(
    phase: Phase, draw: Draw, heads: int, height: int, width: int, device: torch.device
) -> Tensor:
    chosen = phase.choose(draw, heads, height, width)
    return chosen.to(device) if device.type == "mps" else chosen


def _grid(downsample: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of tokens at a resolution, rounded up as in the UNet."""
    return -(-height // downsample), -(-width // downsample)


def _nothing() -> None:
    return None
