"""What a patch did in the last run."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any

from torch import Tensor

from ..errors import PatchError
from .flops import work_left
from .layers import find_unet
from .patch import patch_of
from .report_table import ReportTable
from .run_log import seconds
from .step_policy import FollowRuns


@dataclass(frozen=True)
class StepSummary:
    """What one UNet call did."""

    step: int
    """Denoising step, from 0; second-order schedulers call the UNet twice in most steps."""
    method: str
    """Method of the step's phase."""
    weights: dict[int, float] | None
    """For a light call: the weight of each earlier step's feature in the forecast, averaged over
    the batch; None for a whole one."""
    seconds: float | None
    """Time until the next call began, including the scheduler and callbacks; None for the last
    call."""

    @property
    def is_light(self) -> bool:
        """Whether only the outermost layers were computed."""
        return self.weights is not None

    @property
    def text(self) -> str:
        """``whole``, or ``light`` with the weights of the forecast."""
        if self.weights is None:
            return "whole"
        terms = " ".join(f"{weight:+.3g} × step {step}" for step, weight in self.weights.items())
        return f"light: {terms.removeprefix('+')}"


@dataclass(frozen=True)
class Summary(ReportTable):
    """The result of :func:`summary`; ``print`` and notebooks show it as a table."""

    runs: list[list[StepSummary]]
    """The calls in order; images or batches denoised in turn have one run each. Empty before the
    first run."""
    work: float | None
    """Floating-point operations of the last run, as a share of the unpatched run's; None before the
    first run, and for kinds of UNets that cannot be counted."""

    @property
    def title(self) -> str:
        """The run in one line."""
        calls = [call for run in self.runs for call in run]
        if not calls:
            return "the UNet has not run since it was patched"
        light = sum(call.is_light for call in calls)
        title = f"last run: {len(calls)} UNet calls, {len(calls) - light} whole, {light} light"
        if len(self.runs) > 1:
            title += f", in {len(self.runs)} interleaved runs"
        if self.work is not None:
            title += f"; {self.work:.0%} of the work left"
        for kind, is_light in (("whole", False), ("light", True)):
            times = [c.seconds for c in calls if c.seconds is not None and c.is_light is is_light]
            if times:
                title += f"; {1000 * median(times):.3g} ms per {kind} step"
        return title

    def _rows(self) -> tuple[list[str], list[list[str]]]:
        rows = [
            [
                *([str(number)] if len(self.runs) > 1 else []),
                str(call.step),
                call.method,
                call.text,
                "" if call.seconds is None else f"{1000 * call.seconds:.3g}",
            ]
            for number, run in enumerate(self.runs)
            for call in run
        ]
        header = ["step", "method", "computed", "ms"]
        return ["run", *header] if len(self.runs) > 1 else header, rows


def summary(x: Any) -> Summary:
    """Show what a patch did in the last run: which steps were whole or light, and their times.

    Args:
        x: A patched pipeline or UNet.

    Returns:
        The calls of the last run; images that a loop denoises in turn have one run each.

    Raises:
        PatchError: If ``x`` has no UNet or is not patched.

    Example:
        >>> from agentsd import apply_patch, load_pipeline, summary
        >>> pipe = apply_patch(load_pipeline("pocket"), "balanced", cache_min_steps=4)
        >>> _ = pipe("a red circle", num_inference_steps=4, height=128, width=128)
        >>> [call.text for call in summary(pipe).runs[0]]
        ['whole', 'whole', 'light: -0.5 × step 0 +1.5 × step 1', 'whole']
    """
    unet = find_unet(x)
    patch = patch_of(unet)
    if patch is None:
        raise PatchError("nothing to summarise: not patched; call apply_patch, then run the model")
    runtime = patch.runtime
    if not isinstance(runtime.policy, FollowRuns) or not runtime.policy.log.runs:
        return Summary([], None)
    log = runtime.policy.log
    runs = [
        [
            StepSummary(call.step, call.phase.method, _means(call.weights), span)
            for call, span in zip(run, seconds(run), strict=True)
        ]
        for run in log.runs
    ]
    calls = [(call.phase, call.weights is None) for run in log.runs for call in run]
    assert log.size is not None
    return Summary(runs, work_left(unet, runtime, log.size, unet.device.type, calls))


def _means(weights: dict[int, float | Tensor] | None) -> dict[int, float] | None:
    if weights is None:
        return None
    return {
        step: float(weight.mean()) if isinstance(weight, Tensor) else weight
        for step, weight in weights.items()
    }
