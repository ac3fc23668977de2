"""A schedule drawn over the steps, with what each phase does to the tokens."""

from __future__ import annotations

from html import escape
from itertools import groupby
from threading import Lock
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline

from ...methods import METHODS
from ...models.architectures import Architecture
from ...patching.inspection import LayerInspection, inspect_patch
from ...patching.patch import patched
from ...schedule import Phase, Plan, Schedule
from .phase_borders import border

COLOURS = ("#b45309", "#52525b", "#047857", "#1d4ed8", "#7e22ce", "#be123c", "#0e7490", "#4d7c0f")
"""Colours of the methods' bars, in turn; white text can be read on each."""


class Level(NamedTuple):
    """What a phase does to the layers of one resolution."""

    downsample: int
    layers: int
    plan: Plan


class Timeline:
    """Draws schedules for one model; keeps its architecture, not its weights.

    Args:
        pipe: The model.
    """

    def __init__(self, pipe: DiffusionPipeline) -> None:
        with torch.device("meta"):
            unet = type(pipe.unet).from_config(pipe.unet.config)
        self._architecture = Architecture(unet, pipe.vae_scale_factor)
        self._device = pipe.device.type
        self._lock = Lock()

    def levels(self, schedule: Schedule, height: int, width: int) -> list[list[Level]]:
        """For each phase, the resolutions at which layers are patched, the highest first.

        Raises:
            PatchError: If the schedule matches no layer of the model, or the size does not fit.
        """
        with self._lock, patched(self._architecture, schedule):
            inspection = inspect_patch(self._architecture, height, width, self._device)
        by_downsample: dict[int, list[LayerInspection]] = {}
        for layer in inspection.layers:
            if layer.phases:
                by_downsample.setdefault(layer.downsample, []).append(layer)
        return [
            [
                Level(downsample, len(layers), layers[0].phases[number].plan)
                for downsample, layers in sorted(by_downsample.items())
            ]
            for number in range(len(schedule.phases))
        ]

    def draw(self, schedule: Schedule, steps: int, height: int, width: int) -> str:
        """HTML of the phases over ``steps`` steps, and of their tokens for one image size.

        Raises:
            PatchError: As for :meth:`levels`.
        """
        levels = self.levels(schedule, height, width)
        numbers = [schedule.phases.index(schedule.phase_at(s, steps)) for s in range(steps)]
        runs = [(number, [*run]) for number, run in groupby(range(steps), numbers.__getitem__)]
        spans = {number: (run[0] + 1, run[-1] + 1) for number, run in runs}
        bars = "".join(
            f'<div class="bar" style="flex:{len(run)};background:{colour(schedule.phases[n])}">'
            f"{escape(schedule.phases[n].method)}<small>{_steps(spans[n])}</small></div>"
            + (border(n, run[-1] + 1, steps) if run[-1] + 1 < steps else "")
            for n, run in runs
        )
        rows = "".join(
            _rows(number, phase, spans.get(number), levels[number])
            for number, phase in enumerate(schedule.phases)
        )
        return (
            f'<div class="timeline"><div class="bars">{bars}</div><div class="scroll"><table>'
            "<thead><tr><th>phase</th><th>steps</th><th>layers</th><th>tokens of a layer</th>"
            "<th>query–key pairs kept</th><th>note</th></tr></thead>"
            f"<tbody>{rows}</tbody></table></div></div>"
        )


def colour(phase: Phase) -> str:
    """The colour of a phase's method."""
    return COLOURS[list(METHODS).index(phase.method) % len(COLOURS)]


def _steps(span: tuple[int, int] | None) -> str:
    if span is None:
        return "none"
    return f"step {span[0]}" if span[0] == span[1] else f"steps {span[0]}–{span[1]}"


def _rows(number: int, phase: Phase, span: tuple[int, int] | None, levels: list[Level]) -> str:
    rows = []
    for level in levels:
        cells = (
            f"{number + 1}: {phase.method}",
            _steps(span),
            f"{level.layers} with {level.plan.tokens:,} tokens",
            stages(level.plan, phase),
            f"{pairs(level.plan) / level.plan.tokens**2:.1%}",
            "; ".join(notes(phase, level.plan)),
        )
        rows.append(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
    return "".join(rows)


def stages(plan: Plan, phase: Phase) -> str:
    """The tokens, and how many are left after each stage."""
    if plan.untouched:
        return f"{plan.tokens:,}, as unpatched"
    return " → ".join((f"{plan.tokens:,}", *phase.stages(plan)))


def pairs(plan: Plan) -> int:
    """Pairs of a query and a key: with agents, those of the agents' two softmaxes."""
    if plan.agents:
        return 2 * plan.agents * plan.merged_tokens
    return plan.merged_tokens * plan.keys


def notes(phase: Phase, plan: Plan) -> list[str]:
    """Where a phase differs from what its parameters ask for, and why.

    Example:
        >>> from agentsd import Merge
        >>> phase = Merge(ratio=0.9)
        >>> notes(phase, phase.plan(64, 64))
        ['ratio 0.9 is capped to 0.75: one token of each cell is kept']
    """
    return [] if plan.untouched else phase.caps(plan)
