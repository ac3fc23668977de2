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


def locate(timestep: Tensor | float, scheduler: Any = None) -> Position:
    """Tell the denoising step from the timestep a UNet was called with.

    Pipelines and loops hand the UNet one entry of the scheduler's list of timesteps, as a view
    of it. Its place in memory is its place in the list: unambiguous where the list repeats a
    timestep (PNDM, Heun), the whole list's where a run starts in its middle (img2img), and known
    without waiting for the device. Calls that belong to one step (Heun makes two, PNDM two for
    its first) share its number. Only a timestep that is no view is told by its value, which may
    wait for the device.

    Args:
        timestep: What the UNet was called with: a tensor of no or one dimension, or a number.
        scheduler: The pipeline's scheduler, or None for a UNet on its own.

    Returns:
        The step and the number of steps. Without any list to look into, the step's place on
        the noise scale out of 1,000 stands for both.
    """
    known = getattr(scheduler, "timesteps", None)
    known = known if isinstance(known, Tensor) and known.ndim == 1 and len(known) else None
    index = length = None
    if isinstance(timestep, Tensor):
        storage = timestep.untyped_storage()
        size = storage.nbytes() // timestep.element_size()
        if known is not None and storage.data_ptr() == known.untyped_storage().data_ptr():
            index, length = timestep.storage_offset() - known.storage_offset(), len(known)
        elif size > 1 and (timestep.numel() == 1 or not any(timestep.stride())):
            index, length = timestep.storage_offset(), size
    if index is None or length is None:
        value = float(timestep.flatten()[0]) if isinstance(timestep, Tensor) else float(timestep)
        found = [i for i, t in enumerate(known.tolist()) if t == value] if known is not None else []
        if known is None or not found:
            step = TRAIN_TIMESTEPS - 1 - round(value)
            return Position(min(max(step, 0), TRAIN_TIMESTEPS - 1), TRAIN_TIMESTEPS, listed=False)
        index, length = found[0], len(known)
    num_steps = length
    if known is not None and length == len(known):
        num_steps = getattr(scheduler, "num_inference_steps", None) or length
    # Solvers that call the UNet more often than there are steps list more timesteps than steps.
    return Position(min(index * num_steps // length, num_steps - 1), num_steps)
