"""Tuning of a tiny model in seconds: few images, steps and candidates."""

from __future__ import annotations

import pytest

from agentsd.methods import Cache
from agentsd.tuning import screening, split, step_costs, tuner
from agentsd.tuning.candidates import ATTENTION, CACHES, Segment

FULL = ATTENTION.index({"method": "full"})

STEPS = 8
"""The fewest in which a cache of interval 2 has light steps."""


def cache(interval: int, branch: int, order: int | None = None) -> int:
    """The index of a cache among the candidates'."""
    wanted = Cache.model_validate({"interval": interval, "branch": branch, "order": order})
    return CACHES.index(wanted)


def few_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have tuning try three candidates, of eight steps, on two images, confirm the best on two
    more, and judge it on two."""
    for part in ("TUNING", "HELD_OUT", "MORE"):
        monkeypatch.setattr(split, part, 2)
    monkeypatch.setattr(screening, "ROUNDS", 0)
    monkeypatch.setattr(step_costs, "ROUNDS", 1)
    few = [(Segment(FULL, c, STEPS),) for c in (cache(2, 0, 0), cache(2, -1), cache(2, -1, 0))]
    for module in (screening, tuner):
        monkeypatch.setattr(module, "uniform_candidates", lambda _: few)
