"""Baselines: other methods to speed up a Stable Diffusion UNet, as context managers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from .attention import tiles, todo, tomesd
from .runs import deepcache, fewer_steps, spectrum, taylorseer

BASELINES: dict[str, Callable[..., AbstractContextManager[Any]]] = {
    "tomesd": tomesd,
    "deepcache": deepcache,
    "todo": todo,
    "tiles": tiles,
    "fewer-steps": fewer_steps,
    "taylorseer": taylorseer,
    "spectrum": spectrum,
}
"""Baselines by their names in protocols."""

__all__ = [
    "BASELINES",
    "deepcache",
    "fewer_steps",
    "spectrum",
    "taylorseer",
    "tiles",
    "todo",
    "tomesd",
]
