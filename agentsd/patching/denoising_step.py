"""Where a call of the UNet stands in its run."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

TRAIN_TIMESTEPS = 1000
"""Length of the noise scale that Stable Diffusion's timesteps count on."""


class Position(NamedTuple):
    """Where a call of the UNet stands in its run: denoising step ``step`` of ``num_steps``."""

    step: int
    num_steps: int
    listed: bool = True
    """False where no list of timesteps was found and the two only tell the level of noise."""


class Call(NamedTuple):
    """The place of a UNet call in its list of timesteps."""

    place: int
    length: int
    timesteps: Tensor
    """The list, or a view of it: as long as it is held, no other list has its memory."""

    def is_of_the_same_list_as(self, other: Call) -> bool:
        """Whether two calls belong to one run's list."""
        ours, theirs = self.timesteps.untyped_storage(), other.timesteps.untyped_storage()
        return ours.data_ptr() == theirs.data_ptr() and self.length == other.length


def find_call(timestep: Tensor | float, scheduler: Any = None) -> Call | None:
    """Find the timestep a UNet was called with in its list.

    Pipelines and loops hand the UNet one entry of the scheduler's list of timesteps, as a view
    of it. Its place in memory is its place in the list: unambiguous where the list repeats a
    timestep (PNDM, Heun), the whole list's where a run starts in its middle (img2img), and known
    without waiting for the device. Only a timestep that is no view is looked up by its value,
    which may wait for the device.

    Args:
        timestep: What the UNet was called with: a tensor of no or one dimension, or a number.
        scheduler: The pipeline's scheduler, or None for a UNet on its own.

    Returns:
        The place, or None where there is no list, or the timestep is not in it.
    """
    known = getattr(scheduler, "timesteps", None)
    known = known if isinstance(known, Tensor) and known.ndim == 1 and len(known) else None
    if isinstance(timestep, Tensor):
        storage = timestep.untyped_storage()
        size = storage.nbytes() // timestep.element_size()
        if known is not None and storage.data_ptr() == known.untyped_storage().data_ptr():
            index = timestep.storage_offset() - known.storage_offset()
            return Call(int(index), len(known), known)
        if size > 1 and (timestep.numel() == 1 or not any(timestep.stride())):
            return Call(int(timestep.storage_offset()), size, timestep)
    if known is None:
        return None
    value = _value(timestep)
    found = [i for i, t in enumerate(known.tolist()) if t == value]
    return Call(found[0], len(known), known) if found else None


def locate(timestep: Tensor | float, scheduler: Any = None) -> Position:
    """The :func:`position_of` a timestep's place in its list."""
    return position_of(find_call(timestep, scheduler), timestep, scheduler)


def position_of(call: Call | None, timestep: Tensor | float, scheduler: Any = None) -> Position:
    """Tell the denoising step from the timestep a UNet was called with.

    Calls that belong to one step (Heun makes two, PNDM two for its first) share its number.

    Args:
        call: What :func:`find_call` found for the timestep.
        timestep: What the UNet was called with.
        scheduler: As for :func:`find_call`.

    Returns:
        The step and the number of steps. Without any list to look into, the step's place on
        the noise scale out of 1,000 stands for both.
    """
    if call is None:
        step = TRAIN_TIMESTEPS - 1 - round(_value(timestep))
        return Position(min(max(step, 0), TRAIN_TIMESTEPS - 1), TRAIN_TIMESTEPS, listed=False)
    known, num_steps = getattr(scheduler, "timesteps", None), call.length
    if isinstance(known, Tensor) and known.ndim == 1 and call.length == len(known):
        num_steps = getattr(scheduler, "num_inference_steps", None) or call.length
    # Second-order schedulers call the UNet more often than there are steps, and list each call.
    return Position(min(call.place * num_steps // call.length, num_steps - 1), num_steps)


def _value(timestep: Tensor | float) -> float:
    return float(timestep.flatten()[0]) if isinstance(timestep, Tensor) else float(timestep)
