"""Light steps: UNet calls in which stand-ins replace most modules.

No forward of diffusers is copied, and nothing stays in the model between calls: the forwards of
these modules are replaced just before a call and restored just after it. So hooks that others add
or remove between calls (offloading, LoRA) neither break a light step nor are broken by it.

diffusers' own hooks (``ModelHook``) are not suitable: they were added in 0.33, would have to be
registered between other hooks, and are lost when those are registered again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import PatchError
from .diffusers_internals import forward_slot

OUTPUT = -1
"""The branch that forecasts the output, so that a light step computes nothing."""

NEVER = 1 << 10
"""Sentinel: skipped in every light step."""

OUTER = (
    *("time_proj", "time_embedding", "class_embedding", "add_time_proj", "add_embedding"),
    *("conv_in", "transformer_in", "conv_norm_out"),
)
"""Modules outside a UNet's blocks that a light step needs, unless its output is forecast."""


@dataclass(frozen=True)
class Part:
    """A module that a light step may skip."""

    module: nn.Module
    branch: int
    """The lowest branch at which light steps still compute it."""
    gives_feature: bool = False
    """Whether its output is the feature that the next lower branch forecasts."""
    residuals: int | None = None
    """For a down block: how many residuals it passes to the up blocks."""


def find_parts(unet: Any) -> list[Part]:
    """The modules of a UNet that light steps may skip, unwrapped if compiled.

    Raises:
        PatchError: If its last block lacks the layers that a light step computes.
    """
    first, *down = map(_unwrapped, unet.down_blocks)
    *up, last = map(_unwrapped, getattr(unet, "up_blocks", None) or (None,))
    count = len(getattr(last, "resnets", ()))
    if count < 2:
        raise PatchError(
            f"cache: light steps need a last block of two or more layers, which "
            f"{type(unet).__name__} lacks; drop the cache"
        )
    outer = [_unwrapped(getattr(unet, name, None)) for name in OUTER]
    parts = [Part(module, 0) for module in outer if isinstance(module, nn.Module)]
    parts += [Part(_unwrapped(unet.conv_out), 0, gives_feature=True)]
    parts += [Part(first, 0, residuals=_residuals(first)), Part(last, 0)]
    parts += [Part(module, NEVER, residuals=_residuals(module)) for module in down]
    deep = [module for module in (_unwrapped(unet.mid_block), *up) if module is not None]
    parts += [Part(module, NEVER) for module in deep[:-1]]
    parts += [Part(module, count, gives_feature=True) for module in deep[-1:]]
    for layers in _layers(first):
        parts += [Part(module, number + 1) for number, module in enumerate(layers)]
    parts += [
        Part(_unwrapped(module), NEVER) for module in getattr(first, "downsamplers", None) or ()
    ]
    for layers in _layers(last):
        parts += [
            Part(module, count - 1 - number, gives_feature=True)
            for number, module in enumerate(layers[:-1])
        ]
    return parts


def _unwrapped(module: Any) -> Any:
    """The module that ``torch.compile`` wrapped, or the module itself."""
    return getattr(module, "_orig_mod", module)


def _layers(block: Any) -> Iterator[list[nn.Module]]:
    """The lists of a block that have one module per layer."""
    for name, part in block.named_children():
        is_list = isinstance(part, nn.ModuleList) and not name.endswith("samplers")
        if is_list and len(part) == len(block.resnets):
            yield [_unwrapped(module) for module in part]


def _residuals(block: Any) -> int:
    return len(block.resnets) + len(getattr(block, "downsamplers", None) or ())


class LightSteps:
    """Makes calls of one UNet light, or records the deep feature of whole ones.

    Call :meth:`record` or :meth:`stand_in` before a UNet call, and :meth:`finish` after it.

    Args:
        unet: The UNet.
        branches: The branches of the schedule's caches.

    Raises:
        PatchError: As for :func:`find_parts`, or if a branch leaves nothing to forecast.
    """

    def __init__(self, unet: nn.Module, branches: Iterable[int] = ()) -> None:
        self.branch = NEVER
        self.forecast: Tensor | None = None
        self.feature: Tensor | None = None
        parts = find_parts(unet)
        known = {part.branch - 1 for part in parts if part.gives_feature}
        for branch in sorted(set(branches) - known):
            raise PatchError(
                f"cache: branch {branch}: this UNet has no layers below those that its light "
                "steps would compute; give a lower branch"
            )
        self._stand_ins = [StandIn(part, self) for part in parts]
        self._armed: list[StandIn] = []

    def record(self, branch: int) -> None:
        """Record the feature that ``branch`` forecasts in the next call."""
        self._arm(branch, None)

    def stand_in(self, branch: int, forecast: Tensor) -> None:
        """Make the next call a light step from a forecast feature."""
        self._arm(branch, forecast)

    def finish(self) -> Tensor | None:
        """Restore all forwards.

        Returns:
            The feature that the call recorded, or None.
        """
        while self._armed:
            self._armed.pop().disarm()
        feature, self.feature, self.forecast = self.feature, None, None
        return feature

    def _arm(self, branch: int, forecast: Tensor | None) -> None:
        self.finish()  # the last call may have been interrupted
        self.branch, self.forecast = branch, forecast
        for stand_in in self._stand_ins:
            part = stand_in.part
            records = part.gives_feature and part.branch - 1 == branch
            if records if forecast is None else part.branch > branch:
                self._armed.append(stand_in)
                stand_in.arm()


class StandIn:
    """Replaces a part's forward while armed."""

    def __init__(self, part: Part, state: LightSteps) -> None:
        self.part, self.state = part, state
        self.previous: Any = None
        self._slot: dict[str, Any] = {}

    def arm(self) -> None:
        """Replace the forward."""
        self._slot = forward_slot(self.part.module)
        self.previous = self._slot.get("forward")
        self._slot["forward"] = self

    def disarm(self) -> None:
        """Restore what was there before."""
        if self._slot.get("forward") is self:
            if self.previous is None:
                del self._slot["forward"]
            else:
                self._slot["forward"] = self.previous
        self._slot, self.previous = {}, None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The part's output, which is recorded, or in a light step a placeholder of its form."""
        part, state = self.part, self.state
        if state.forecast is None:
            if self.previous is None:
                out = type(part.module).forward(part.module, *args, **kwargs)
            else:
                out = self.previous(*args, **kwargs)
            # Copied, as FreeU changes hidden states in place; detached, as a backward pass frees
            # the graph.
            state.feature = (out if isinstance(out, Tensor) else out[0]).detach().clone()
            return out
        hidden = (*args, *kwargs.values())[0]  # the first argument, whatever its name
        if part.gives_feature and part.branch == state.branch + 1:
            hidden = state.forecast
        elif hidden.ndim < 2:
            hidden = hidden[:, None]
        else:
            # Unused downstream; one channel keeps the concatenation small.
            hidden = hidden[:, :1]
        if part.residuals is not None:
            return hidden, (hidden,) * part.residuals
        return (hidden,) if kwargs.get("return_dict") is False else hidden


def without_deep_residuals(kwargs: dict[str, Any], branch: int) -> dict[str, Any]:
    """A light step's arguments, without what ControlNets and T2I-Adapters add to deep layers."""
    mid, down = "mid_block_additional_residual", "down_block_additional_residuals"
    kwargs = {k: v for k, v in kwargs.items() if k != "down_intrablock_additional_residuals"}
    if kwargs.get(mid) is None:  # then they are a T2I-Adapter's, under an old name
        kwargs.pop(down, None)
    elif kwargs.get(down) is not None:
        kept = [x if number <= branch else 0.0 for number, x in enumerate(kwargs[down])]
        kwargs |= {mid: 0.0, down: tuple(kept)}
    return kwargs


def light_step_conflict(unet: nn.Module) -> str | None:
    """Why a UNet in its current state cannot have light steps; None if it can."""
    for module in unet.modules():
        forward = vars(module).get("forward")
        if (getattr(forward, "__module__", None) or "").partition(".")[0] == "DeepCache":
            return (
                "DeepCache skips the same layers; use one of the two: call its helper's "
                "disable(), or choose a schedule without a cache"
            )
    return None
