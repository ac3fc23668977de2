"""Light steps: the outermost layers alone, on a forecast of the deep feature they build on.

A UNet's deep layers change slowly from step to step. DeepCache (Ma et al., 2023, arXiv 2312.00858)
computes them at every so many steps and holds their last output in between; here it is continued
along its line or parabola (Lagrange) through the last steps that were computed whole.

No forward of diffusers is copied: a light step calls the UNet as ever, and the modules that it
leaves out are stood in for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import PatchError
from ..schedule import Phase, Schedule
from .diffusers_internals import UNet2DConditionOutput
from .step_cache import Feature

if TYPE_CHECKING:
    from .runtime import Runtime

NEVER = 1 << 10
"""A branch that no phase has."""

FEWEST_INTERVALS = 4
"""Runs of fewer steps than so many intervals are computed whole.

In shorter runs the features change too much from step to step: on the pocket model, leaving out
steps altogether came closer to the image in the same time."""


@dataclass(frozen=True)
class Part:
    """A module that a light step may leave out."""

    module: nn.Module
    branch: int
    """The least ``cache_branch`` at which it is computed, all the same."""
    gives_feature: bool = False
    """Whether its output is the feature that the next lower branch forecasts."""
    residuals: int | None = None
    """Of a block on the way down: how many it hands to the way up."""


def find_parts(unet: Any) -> list[Part]:
    """The modules of a UNet that light steps leave out.

    Raises:
        PatchError: If its last block does not have the layers that a light step computes.
    """
    first, *down = unet.down_blocks
    *up, last = getattr(unet, "up_blocks", None) or (None,)
    count = len(getattr(last, "resnets", ()))
    if count < 2:
        raise PatchError(
            f"cache_interval: {type(unet).__name__} has no last block of two or more layers, of "
            "which a light step could compute the outermost; drop cache_interval"
        )
    parts = [Part(unet, 0, gives_feature=True)]
    parts += [Part(module, NEVER, residuals=_residuals(module)) for module in down]
    deep = [module for module in (unet.mid_block, *up) if module is not None]
    parts += [Part(module, NEVER) for module in deep[:-1]]
    parts += [Part(module, count, gives_feature=True) for module in deep[-1:]]
    for layers in _layers(first):
        parts += [Part(module, number + 1) for number, module in enumerate(layers)]
    parts += [Part(module, NEVER) for module in getattr(first, "downsamplers", None) or ()]
    for layers in _layers(last):
        parts += [
            Part(module, count - 1 - number, gives_feature=True)
            for number, module in enumerate(layers[:-1])
        ]
    return parts


def _layers(block: Any) -> Iterator[nn.ModuleList]:
    """The lists of a block that have a module for each of its layers."""
    for name, part in block.named_children():
        is_list = isinstance(part, nn.ModuleList) and not name.endswith("samplers")
        if is_list and len(part) == len(block.resnets):
            yield part


def _residuals(block: Any) -> int:
    return len(block.resnets) + len(getattr(block, "downsamplers", None) or ())


def install(unet: nn.Module, runtime: Runtime) -> None:
    """Stand in for the modules that light steps leave out, until :func:`remove`."""
    lowest = min(phase.cache_branch for phase in runtime.schedule.phases)
    for part in find_parts(unet):
        if part.branch > lowest:  # others are computed in every step
            previous = vars(part.module).get("forward")
            part.module.forward = partial(_forward, part, runtime, previous)


def remove(unet: nn.Module) -> None:
    """Put back the forwards that were there before."""
    for module in unet.modules():
        ours = vars(module).get("forward")
        if isinstance(ours, partial) and ours.func is _forward:
            previous = ours.args[2]
            if previous is None:
                del module.forward
            else:
                module.forward = previous


def _forward(part: Part, runtime: Runtime, previous: Any, *args: Any, **kwargs: Any) -> Any:
    """What a part gives: its output, or in a light step something of the same make."""
    step = runtime.step
    if step is None or step.forecast is None or step.phase.cache_branch >= part.branch:
        if previous is None:
            out = type(part.module).forward(part.module, *args, **kwargs)
        else:
            out = previous(*args, **kwargs)
        if step is not None and part.gives_feature and part.branch - 1 == step.records:
            # A copy: FreeU changes hidden states in place.
            step.features["deep"] = (out if isinstance(out, Tensor) else out[0]).clone()
        return out
    hidden = (*args, *kwargs.values())[0]  # the first, whatever blocks call it
    if part.gives_feature and part.branch == step.phase.cache_branch + 1:
        hidden = step.forecast
    else:
        hidden = hidden[:, :1]  # nobody computes with it; what it is joined to need not be large
    if part.residuals is not None:
        return hidden, (hidden,) * part.residuals
    if kwargs.get("return_dict") is False:
        return (hidden,)
    return hidden if part.branch else UNet2DConditionOutput(hidden)


def without_deep_residuals(kwargs: dict[str, Any], branch: int) -> dict[str, Any]:
    """A light step's arguments, without what ControlNets and T2I-Adapters add to deep layers."""
    mid, down = "mid_block_additional_residual", "down_block_additional_residuals"
    kwargs = {k: v for k, v in kwargs.items() if k != "down_intrablock_additional_residuals"}
    if kwargs.get(mid) is None:  # else they are a T2I-Adapter's, under an old name
        kwargs.pop(down, None)
    elif kwargs.get(down) is not None:
        kept = [x if number <= branch else 0.0 for number, x in enumerate(kwargs[down])]
        kwargs |= {mid: 0.0, down: tuple(kept)}
    return kwargs


def fewest_steps(phase: Phase) -> int:
    """The length of the shortest run in which a phase with a cache leaves out work."""
    return FEWEST_INTERVALS * phase.cache_interval


def has_light_steps(phase: Phase, num_steps: int) -> bool:
    """Whether a phase leaves out work in a run of ``num_steps``."""
    return phase.cache_interval > 1 and num_steps >= fewest_steps(phase)


def usable(known: Sequence[Feature], phase: Phase, step: int, num_steps: int) -> Sequence[Feature]:
    """The features that a step is forecast from; none where it is to be computed whole.

    Whole are the first step of each phase and the last of the run, and from there every
    ``cache_interval``-th. Forecasts take as many features as are known, up to one more than
    ``cache_order``: the first light steps of a run hold the only one there is.

    Args:
        known: Features of earlier steps of the run, the oldest first.
        phase: The step's phase.
        step: Its number.
        num_steps: The number of steps of the run.
    """
    known = [feature for feature in known if feature.phase.cache_branch == phase.cache_branch]
    begins = not known or known[-1].phase is not phase
    if begins or (num_steps - 1 - step) % phase.cache_interval == 0:
        return []
    return known[-1 - phase.cache_order :]


def forecast(known: Sequence[Feature], phase: Phase, step: int, num_steps: int) -> Tensor | None:
    """The deep feature that a step builds on, from those that are :func:`usable` for it."""
    taken = usable(known, phase, step, num_steps)
    values = {float(feature.step): feature.value for feature in taken}
    return extrapolated(values, float(step)) if values else None


def whole_steps(schedule: Schedule, num_steps: int) -> list[bool]:
    """Whether each step of a run from its start is computed whole.

    Example:
        >>> from agentsd import Phase, Schedule
        >>> schedule = Schedule(phases=[Phase(method="keys", cache_interval=3)])
        >>> "".join("light whole ".split()[w][0] for w in whole_steps(schedule, 12))
        'wlwllwllwllw'
    """
    known: list[Feature] = []
    whole = []
    for step in range(num_steps):
        phase = schedule.phase_at(step, num_steps)
        caches = has_light_steps(phase, num_steps)
        whole.append(not caches or not usable(known, phase, step, num_steps))
        if not caches:
            known.clear()
        elif whole[-1]:
            known.append(Feature(step, phase, torch.empty(0)))
    return whole


def extrapolated(known: Mapping[float, Tensor], x: float) -> Tensor:
    """Continue the polynomial through known values (Neville's scheme).

    Args:
        known: Values by where they are known.
        x: Where to continue it to.
    """
    places, values = list(known), list(known.values())
    if len(values) == 1:
        return values[0].clone()
    for width in range(1, len(places)):
        values = [
            torch.lerp(a, b, (x - start) / (end - start))
            for a, b, start, end in zip(values, values[1:], places, places[width:], strict=False)
        ]
    return values[0]
