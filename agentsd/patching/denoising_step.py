"""Locates a UNet call in its run."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

TRAIN_TIMESTEPS = 1000
"""Number of timesteps that Stable Diffusion is trained on."""


class Position(NamedTuple):
    """The position of a UNet call in its run: denoising step ``step`` of ``num_steps``."""

    step: int
    num_steps: int
    listed: bool = True
    """False if no list of timesteps was found, so that the two only give the noise level."""


class Call(NamedTuple):
    """The place of a UNet call in its list of timesteps."""

    place: int
    timesteps: Tensor
    """The list. Holding it keeps its memory from being reused for another list."""
    num_steps: int
    """Denoising steps of the list; second-order schedulers call the UNet twice per step."""
    is_entry: bool = True
    """Whether the UNet was given an entry of the scheduler's own list, rather than an entry of
    another tensor or just an equal number."""

    @property
    def length(self) -> int:
        """Number of entries in the list."""
        return len(self.timesteps)

    def step_of(self, place: int) -> int:
        """The denoising step that an entry of the list belongs to."""
        return min(place * self.num_steps // self.length, self.num_steps - 1)

    def is_of_the_same_list_as(self, other: Call) -> bool:
        """Whether two calls belong to one run's list."""
        return _memory(self.timesteps) == _memory(other.timesteps)

    def is_monotonic(self, *, strictly: bool) -> bool:
        """Whether the list only falls or only rises, as in a run. May wait for the device.

        Args:
            strictly: Whether repeated timesteps are ruled out.
        """
        values = self.timesteps.tolist()
        falling, rising = pairwise(values), pairwise(values[::-1])
        return any(
            all(a > b if strictly else a >= b for a, b in pairs) for pairs in (falling, rising)
        )


def find_call(timestep: Tensor | float, scheduler: Any = None) -> Call | None:
    """Find the timestep that a UNet was called with in its list.

    Pipelines and loops pass the UNet one entry of the scheduler's list of timesteps, as a view.
    Its memory address gives its place in the list: this is unambiguous if the list repeats a
    timestep (PNDM, Heun), refers to the whole list if a run starts in its middle (img2img), and
    does not wait for the device. Only a timestep that is not a view is looked up by value, which
    may wait for the device.

    Args:
        timestep: The timestep that the UNet was called with: a 0- or 1-dimensional tensor, or a
            number.
        scheduler: The pipeline's scheduler, or None for a bare UNet.

    Returns:
        The place, or None if there is no list or the timestep is not in it. A list other than the
        scheduler's may be any tensor, such as random noise levels (:meth:`Call.is_monotonic`).
    """
    known = getattr(scheduler, "timesteps", None)
    known = known if isinstance(known, Tensor) and known.ndim == 1 and len(known) else None
    if isinstance(timestep, Tensor):
        if timestep.numel() > 1 and any(timestep.stride()):  # one timestep per image
            return _by_value(timestep, known, scheduler)
        for timesteps in (known, _viewed_list(timestep)):
            place = None if timesteps is None else _place_in(timesteps, timestep)
            if timesteps is not None and place is not None:
                own = timesteps is known
                steps = _num_steps(scheduler, timesteps) if own else len(timesteps)
                return Call(place, timesteps, steps, own)
    return _by_value(timestep, known, scheduler)


def _by_value(timestep: Tensor | float, known: Tensor | None, scheduler: Any) -> Call | None:
    if known is None:
        return None
    values = timestep.flatten().tolist() if isinstance(timestep, Tensor) else [float(timestep)]
    places = [i for i, t in enumerate(known.tolist()) if t == values[0]]
    if not places or any(value != values[0] for value in values):
        return None
    return Call(places[0], known, _num_steps(scheduler, known), is_entry=False)


def _memory(x: Tensor) -> tuple[int, ...]:
    return x.untyped_storage().data_ptr(), int(x.storage_offset()), len(x), x.stride(0)


def _place_in(timesteps: Tensor, timestep: Tensor) -> int | None:
    """The place of a view in a list; None if it is not one of its entries."""
    if timesteps.untyped_storage().data_ptr() != timestep.untyped_storage().data_ptr():
        return None
    offset = int(timestep.storage_offset() - timesteps.storage_offset())
    place, rest = divmod(offset, timesteps.stride(0) or 1)
    return place if not rest and 0 <= place < len(timesteps) else None


def _viewed_list(timestep: Tensor) -> Tensor | None:
    """The one-dimensional tensor of two or more entries that a timestep is a view of."""
    base = timestep._base
    if base is None and timestep.is_inference():  # such tensors do not record their base
        size = timestep.untyped_storage().nbytes() // timestep.element_size()
        base = torch.as_strided(timestep, (int(size),), (1,), 0)
    return base if base is not None and base.ndim == 1 and len(base) > 1 else None


def _num_steps(scheduler: Any, timesteps: Tensor) -> int:
    return getattr(scheduler, "num_inference_steps", None) or len(timesteps)


def locate(timestep: Tensor | float, scheduler: Any = None) -> Position:
    """The position of a UNet call, from its timestep."""
    return position_of(find_call(timestep, scheduler), timestep)


def position_of(call: Call | None, timestep: Tensor | float) -> Position:
    """The position of a UNet call, from its place in the list of timesteps.

    Calls that belong to one step (Heun makes two, PNDM two for its first) share its number.

    Args:
        call: The result of :func:`find_call` for the timestep.
        timestep: The timestep that the UNet was called with.

    Returns:
        The step and the number of steps. Without a list, they give the noise level out of 1,000
        instead.
    """
    if call is None:
        value = timestep.flatten()[0] if isinstance(timestep, Tensor) else timestep
        step = TRAIN_TIMESTEPS - 1 - round(float(value))
        return Position(min(max(step, 0), TRAIN_TIMESTEPS - 1), TRAIN_TIMESTEPS, listed=False)
    return Position(call.step_of(call.place), call.num_steps)
