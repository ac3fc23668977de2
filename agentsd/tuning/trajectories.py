"""Recorded unpatched runs: the inputs and outputs of every UNet call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ..generation.image_files import writing
from ..image_settings import ImageSettings
from ..patching.denoising_step import Position, locate


@dataclass(frozen=True)
class UNetCall:
    """A UNet call of an unpatched run."""

    position: Position
    arguments: dict[str, Any]
    """Its arguments by name; tensors are on the CPU."""
    output: Tensor
    """``[B, C, H, W]``, on the CPU."""

    @property
    def latents(self) -> Tensor:
        """``[B, C, H, W]``, on the CPU."""
        latents: Tensor = self.arguments["sample"]
        return latents


@dataclass(frozen=True)
class Trajectory:
    """The UNet calls of an unpatched run, in order."""

    settings: ImageSettings
    calls: list[UNetCall]

    def guided(self, output: Tensor) -> Tensor:
        """Apply classifier-free guidance to a UNet output; returns ``[B, C, H, W]``."""
        if self.settings.guidance_scale <= 1 or len(output) < 2:
            return output
        negative, positive = output.chunk(2)
        return negative + self.settings.guidance_scale * (positive - negative)

    def save(self, file: Path) -> None:
        """Write the trajectory to a file.

        Raises:
            OutputError: If the file cannot be written.
        """
        calls = [(tuple(call.position), call.arguments, call.output) for call in self.calls]
        with writing(file) as out:
            torch.save({"settings": self.settings.model_dump(), "calls": calls}, out)

    @classmethod
    def load(cls, file: Path) -> Trajectory:
        """Read what :meth:`save` wrote."""
        data = torch.load(file, weights_only=True)
        calls = [UNetCall(Position(*position), *rest) for position, *rest in data["calls"]]
        return cls(ImageSettings(**data["settings"]), calls)


@contextmanager
def recorded_calls(pipe: DiffusionPipeline) -> Iterator[list[UNetCall]]:
    """Record the calls of a pipeline's UNet until the end of the ``with`` block."""
    calls: list[UNetCall] = []
    names = ("sample", "timestep", "encoder_hidden_states")

    def record(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        arguments = dict(zip(names, args, strict=False)) | kwargs
        first = output[0] if isinstance(output, tuple) else output.sample
        position = locate(arguments["timestep"], pipe.scheduler)
        kept = {name: moved(value, "cpu") for name, value in arguments.items()}
        calls.append(UNetCall(position, kept, moved(first, "cpu")))

    hook = pipe.unet.register_forward_hook(record, with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()


def moved(value: Any, device: torch.device | str) -> Any:
    """A copy of an argument with all of its tensors on a device."""
    if isinstance(value, Tensor):
        return value.detach().clone().to(device)
    if isinstance(value, Mapping):
        return {name: moved(part, device) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(moved(part, device) for part in value)
    return value
