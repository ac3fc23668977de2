"""The variants that are timed against each other, each a change to a UNet that is undone after."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from ..baselines import tiles, todo, tomesd
from ..patching.layers import replaced_processors, top_attention_layers
from ..patching.patch import patched
from ..schedule import Phase, Schedule

UNetPatch = Callable[[UNet2DConditionModel], AbstractContextManager[Any]]
"""Changes a UNet until the end of a ``with`` block."""


@contextmanager
def floor(unet: UNet2DConditionModel) -> Iterator[None]:
    """Skip self-attention at the highest resolution: no patch can be faster."""
    with replaced_processors(top_attention_layers(unet), lambda _: _Zeros()):
        yield


class _Zeros:
    """At module level because a compiler treats each new class as new code."""

    def __call__(self, attn: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.zeros_like(hidden_states)


def variants_of(schedules: list[str], baselines: bool = True) -> dict[str, UNetPatch]:
    """Unpatched, the floor, each phase of the schedules on its own, and the installed baselines.

    Args:
        schedules: Names of presets or paths of YAML files.
        baselines: Also tomesd (PyPI), downsampled keys (the ToDo idea), tiles (the HyperTile idea).

    Raises:
        ScheduleError: If a schedule cannot be read.
    """
    found = dict(REFERENCES)
    for name in schedules:
        phases = Schedule.load(name).phases
        for number, phase in enumerate(phases, 1):
            label = Path(name).stem + (f", phase {number}" if len(phases) > 1 else "")
            found[label] = _constant(phase)
    installed = {
        k: v for k, v in BASELINES.items() if not k.startswith("tomesd") or find_spec("tomesd")
    }
    return found | installed if baselines else found


def _constant(phase: Phase) -> UNetPatch:
    settings = {k: v for k, v in phase.to_dict().items() if k not in ("until", "until_step")}
    schedule = Schedule(phases=(Phase(**settings),))
    return lambda unet: patched(unet, schedule)


REFERENCES: dict[str, UNetPatch] = {"unpatched": lambda _: nullcontext(), "floor": floor}
"""Variants that the others are measured against."""

BASELINES: dict[str, UNetPatch] = {
    "tomesd 0.4": partial(tomesd, ratio=0.4),
    "tomesd 0.5": partial(tomesd, ratio=0.5),
    "ToDo, stride 2": partial(todo, stride=2),
    "tiles of 256": partial(tiles, side=16),
}
