"""Decides which step of the schedule a UNet call belongs to, and whether it is light."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from ..errors import ScheduleError
from ..schedule import Phase, Schedule
from .denoising_step import Call, Position, find_call, position_of
from .forecasts import forecast, has_light_steps, usable
from .light_steps import light_step_conflict
from .run_log import RunLog
from .step_cache import StepCache, Stream


class Decision(NamedTuple):
    """What a UNet call should do."""

    position: Position
    phase: Phase
    forecast: Tensor | None = None
    """The deep feature that a light step starts from; None for a whole step."""
    records: bool = False
    """Whether the call records the feature for later light steps of its phase."""


class StepPolicy(Protocol):
    """Decides what each call does."""

    def decide(self, unet: nn.Module, inputs: Mapping[str, Any]) -> Decision:
        """Decide on a call.

        Args:
            unet: The UNet.
            inputs: Its arguments, by name.
        """

    def finish(self, feature: Tensor | None) -> None:
        """Receive the deep feature, if any, that a successful call recorded."""


class FollowRuns:
    """The policy of a patch: derives the step from each call's timestep, without counting calls.

    Args:
        schedule: What each step does.
        pipeline: The pipeline whose scheduler lists the steps, or None for a bare UNet.
    """

    def __init__(self, schedule: Schedule, pipeline: Any = None) -> None:
        self.schedule = schedule
        self.log = RunLog()
        """The calls of the current or last run."""
        # Weak, so that the UNet does not keep its pipeline's other models alive. The scheduler is
        # looked up at every call, as it may be swapped; the last one is remembered for pipelines
        # made from this one, which may outlive it.
        self._pipeline, self._scheduler = _weak(pipeline), _weak(None)
        self._cache = StepCache()
        self._stream: Stream | None = None
        self._phase: Phase | None = None
        self._conflict: str | None = None
        self._warned: set[str] = set()
        # The keys of a single phase can cycle along any list.
        self._needs_run = schedule.has_cache or len(schedule.phases) > 1

    def __getstate__(self) -> dict[str, Any]:
        """Pickles leave out the pipeline and caches; timesteps still identify their list."""
        weak = {"_pipeline": _weak(None), "_scheduler": _weak(None)}
        return vars(self) | weak | {"_cache": StepCache(), "_stream": None, "log": RunLog()}

    def __deepcopy__(self, memo: dict[int, Any]) -> FollowRuns:
        """A copy belongs to the copy of its pipeline, if that is being copied."""
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        vars(twin).update(copy.deepcopy(self.__getstate__(), memo))
        twin._pipeline = _weak(memo.get(id(self._pipeline())))
        return twin

    def decide(self, unet: nn.Module, inputs: Mapping[str, Any]) -> Decision:
        """Derive the step from the timestep, and forecast from earlier calls of the same run.

        Raises:
            ScheduleError: If a phase ends at a step number but the steps are unknown.
        """
        self._stream = None
        timestep, scheduler = inputs["timestep"], self._find_scheduler()
        call = find_call(timestep, scheduler)
        if call is not None and self._needs_run and not _is_run(call, scheduler):
            call = None
        position = position_of(call, timestep)
        if self.schedule.counts_steps and not position.listed:
            raise ScheduleError(
                "until_step counts steps, but this UNet was called with a timestep that belongs "
                "to no scheduler's list; patch the pipeline rather than its UNet, or use until"
            )
        self._phase = phase = self.schedule.phase_at(position.step, position.num_steps)
        decision, used = Decision(position, phase), None
        if self.schedule.has_cache:
            decision, used = self._with_cache(decision, call, unet, inputs, scheduler)
        if self._stream is not None and self._stream.opens:
            self.log.begin()
        # Identified by number, since a stream holds tensors.
        run = None if self._stream is None else self._stream.born
        self.log.add(run, position.step, phase, used, inputs["sample"])
        return decision

    def finish(self, feature: Tensor | None) -> None:
        """Keep a feature for later calls of the run, and free those of a run that is over."""
        if self._stream is not None and self._phase is not None:
            if feature is not None:
                self._cache.put(self._stream, self._phase, feature)
            self._cache.end(self._stream)
        self._stream = None

    def _find_scheduler(self) -> Any:
        pipeline = self._pipeline()
        scheduler = getattr(pipeline, "scheduler", None)
        if pipeline is None:
            return self._scheduler()
        if scheduler is not self._scheduler():
            self._scheduler = _weak(scheduler)
        return scheduler

    def _with_cache(
        self,
        decision: Decision,
        call: Call | None,
        unet: nn.Module,
        inputs: Mapping[str, Any],
        scheduler: Any,
    ) -> tuple[Decision, dict[int, float | Tensor] | None]:
        """Apply the cache to a decision; also returns the weights of its forecast."""
        position, phase, *_ = decision
        if call is None or not (call.is_entry or call.is_monotonic(strictly=True)):
            self._warn_of_no_run(scheduler)
            return decision, None
        expected = getattr(self._pipeline(), "num_timesteps", None)
        expected = expected if call.is_entry and type(expected) is int else None
        self._stream, problem = self._cache.follow(call, inputs, expected)
        if problem is not None:
            self._warn(
                problem,
                f"agentsd restarts its cache in the middle of a run, since {problem}. Calls that "
                "cannot be matched to a run are computed in full; in a loop of your own, wrap the "
                "calls of each run in `with agentsd.cache_context(key)`",
            )
        steps = self._stream.steps
        if not has_light_steps(phase, len(steps)):
            self._stream.kept.clear()  # the next phase with a cache starts from scratch
            if phase.cache is not None and problem is None:
                self._warn(
                    f"short {len(steps)}",
                    f"this run of {len(steps)} steps computes each step in full: a cache of "
                    f"interval {phase.cache.interval} only pays off in runs of "
                    f"{phase.cache.fewest_steps} steps or more (min_steps)",
                )
            return decision, None
        if self._stream.begins == call.place:
            self._conflict = light_step_conflict(unet)
            self._warn_of_noise(scheduler)
        if self._conflict is not None:
            self._warn(self._conflict, f"agentsd computes each step in full: {self._conflict}")
            return decision, None
        known = usable(self._stream.features, phase, position.step, steps.stop)
        if not known:
            return decision._replace(records=True), None
        value, weights = forecast(known, position.step)
        return decision._replace(forecast=value), weights

    def _warn_of_no_run(self, scheduler: Any) -> None:
        what = (
            "call the UNet with the entries of a falling list of timesteps, or patch its pipeline"
            if scheduler is None
            else "call the UNet with the entries of its scheduler's `timesteps`"
        )
        self._warn(
            "no run",
            "agentsd computes each step in full: the timesteps that the UNet was called with "
            f"(numbers, copies, random noise levels) do not identify a run; {what}",
        )

    def _warn_of_noise(self, scheduler: Any) -> None:
        if (name := type(scheduler).__name__) not in self._warned and _adds_noise(scheduler):
            self._warn(
                name,
                f"{name} adds noise at each step, which agentsd cannot forecast: expect images "
                'unlike the unpatched ones. The preset "faithful" stays closer, and so does this '
                "schedule with a scheduler that adds no noise (DPM++ 2M, DDIM, UniPC, Euler)",
            )

    def _warn(self, cause: str, message: str) -> None:
        """Warn once per cause."""
        if cause not in self._warned:
            self._warned.add(cause)
            warnings.warn(message, stacklevel=2)


class GivenSteps:
    """The policy for UNet calls out of order: each follows the decision set before it."""

    decision: Decision
    feature: Tensor | None = None
    """What the last call recorded."""

    def decide(self, unet: nn.Module, inputs: Mapping[str, Any]) -> Decision:
        """Return the decision that was set."""
        return self.decision

    def finish(self, feature: Tensor | None) -> None:
        """Make the feature available."""
        self.feature = feature


def _weak(x: Any) -> Callable[[], Any]:
    return _nothing if x is None else weakref.ref(x)


def _nothing() -> None:
    return None


def _is_run(call: Call, scheduler: Any) -> bool:
    """Whether the list of a call may be a run's: the scheduler's own, or a monotonic one."""
    is_own = scheduler is not None and call.timesteps is getattr(scheduler, "timesteps", None)
    return is_own or call.is_monotonic(strictly=False)


def _adds_noise(scheduler: Any) -> bool:
    """Whether a scheduler adds noise to the latents at each step."""
    algorithm = str(getattr(getattr(scheduler, "config", None), "algorithm_type", None))
    names = ("Ancestral", "DDPM", "LCM", "SASolver", "SDE", "StochasticIterative", "TCD")
    return algorithm.startswith("sde") or any(n in type(scheduler).__name__ for n in names)
