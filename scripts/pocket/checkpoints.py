"""Checkpoints that survive a kill at any moment, and the clock of the training."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path

import torch

LONGEST_STEP = 20.0  # seconds; a step that took longer was paused, not working


def save_atomically(state: dict, path: Path) -> None:
    """Write a checkpoint atomically, so that `path` is always complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    torch.save(state, part)
    os.replace(part, path)


def load(path: Path, device: torch.device) -> dict | None:
    """Read a checkpoint, or return None where there is none."""
    if not path.exists():
        return None
    return torch.load(path, map_location=device, weights_only=True)


def rng_state(device: torch.device) -> dict:
    """PyTorch's random state; the data need none, since samples are numbered."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict, device: torch.device) -> None:
    """Restore the state from `rng_state`."""
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


class Clock:
    """Counts seconds of training across restarts; pauses (SIGSTOP, a suspended machine) are capped.

    Args:
        budget: total seconds of training.
        spent: seconds that earlier runs used.
    """

    def __init__(self, budget: float, spent: float = 0.0):
        self.budget, self.spent = budget, spent
        self._last = time.monotonic()

    def tick(self) -> float:
        """Count the time since the last tick; return the progress in 0..1."""
        now = time.monotonic()
        self.spent += min(now - self._last, LONGEST_STEP)
        self._last = now
        return self.progress

    def rest(self) -> None:
        """Skip the time since the last tick, which was not training."""
        self._last = time.monotonic()

    @property
    def progress(self) -> float:
        """Share of the budget that is used, 0..1."""
        return min(1.0, self.spent / self.budget)


class Average:
    """An exponential moving average of parameters, with the usual warm-up.

    Args:
        parameters: what to follow.
        decay: share of the old average that each step keeps, 0..1.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], decay: float):
        self.parameters, self.decay, self.steps = list(parameters), decay, 0
        self.shadow = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Update the averages."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.shadow, [p.detach() for p in self.parameters], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Swap parameters and averages; a second call undoes the first."""
        for parameter, shadow in zip(self.parameters, self.shadow, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(shadow)
            shadow.copy_(kept)

    def state_dict(self) -> dict:
        """The state for a checkpoint."""
        return {"steps": self.steps, "shadow": self.shadow}

    def load_state_dict(self, state: dict) -> None:
        """Restore from `state_dict`."""
        self.steps = state["steps"]
        for mine, theirs in zip(self.shadow, state["shadow"], strict=True):
            mine.copy_(theirs)
