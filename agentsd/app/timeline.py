"""A schedule drawn over the steps, with what each phase makes of the tokens."""

from __future__ import annotations

from html import escape
from itertools import groupby
from threading import Lock
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline

from ..models.architectures import Architecture
from ..patching.patch import inspect_patch, patched
from ..schedule import Phase, Plan, Schedule


class Tokens(NamedTuple):
    """What a phase makes of the tokens of one resolution."""

    downsample: int
    layers: int
    plan: Plan
    works: bool
    """Whether the phase changes these layers."""


class Timeline:
    """Draws schedules for one model, of which it keeps the shape and no weights.

    Args:
        pipe: The model.
    """

    def __init__(self, pipe: DiffusionPipeline) -> None:
        with torch.device("meta"):
            unet = type(pipe.unet).from_config(pipe.unet.config)
        self._shape = Architecture(unet, pipe.vae_scale_factor)
        self._device = pipe.device.type
        self._lock = Lock()

    def tokens(self, schedule: Schedule, height: int, width: int) -> list[list[Tokens]]:
        """Per phase, the resolutions at which layers are patched, the highest first.

        Raises:
            PatchError: If the schedule fits no layer of the model, or the size does not.
        """
        with self._lock, patched(self._shape, schedule):
            found = inspect_patch(self._shape, height, width, self._device)
        layers = [layer for layer in found["layers"] if layer["phases"]]
        levels: dict[int, list[dict[str, Any]]] = {}
        for layer in layers:
            levels.setdefault(layer["downsample"], []).append(layer)
        told = []
        for number in range(len(schedule.phases)):
            rows = []
            for downsample, alike in sorted(levels.items()):
                phase = dict(alike[0]["phases"][number])
                works = phase.pop("method") != "full"
                rows.append(Tokens(downsample, len(alike), Plan(**phase), works))
            told.append(rows)
        return told

    def draw(self, schedule: Schedule, steps: int, height: int, width: int) -> str:
        """HTML of the phases over ``steps`` steps, and of their tokens for an image's size.

        Raises:
            PatchError: As for :meth:`tokens`.
        """
        every = self.tokens(schedule, height, width)
        which = [schedule.phases.index(schedule.phase_at(s, steps)) for s in range(steps)]
        runs = [(number, [*run]) for number, run in groupby(range(steps), which.__getitem__)]
        spans = {number: (run[0] + 1, run[-1] + 1) for number, run in runs}
        bars = "".join(
            f'<div class="bar {schedule.phases[n].method}" style="flex:{len(run)}">'
            f"{schedule.phases[n].method}<small>{_steps(spans[n])}</small></div>"
            for n, run in runs
        )
        rows = "".join(
            _row(number, phase, spans.get(number), tokens)
            for number, (phase, tokens) in enumerate(zip(schedule.phases, every, strict=True))
        )
        return (
            f'<div class="timeline"><div class="bars">{bars}</div><div class="scroll"><table>'
            "<thead><tr><th>phase</th><th>steps</th><th>layers</th><th>tokens → merged → agents "
            "or keys</th><th>query–key pairs left</th><th>note</th></tr></thead>"
            f"<tbody>{rows}</tbody></table></div></div>"
        )


def _steps(span: tuple[int, int] | None) -> str:
    if span is None:
        return "none"
    return f"step {span[0]}" if span[0] == span[1] else f"steps {span[0]}–{span[1]}"


def _row(number: int, phase: Phase, span: tuple[int, int] | None, tokens: list[Tokens]) -> str:
    lines = []
    for level in tokens:
        share = pairs(level.plan) / level.plan.tokens**2
        cells = (
            f"{number + 1}: {phase.method}",
            _steps(span),
            f"{level.layers} of {level.plan.tokens:,} tokens",
            counts(level.plan, phase),
            f"{share:.1%}",
            "; ".join(notes(phase, level)),
        )
        body = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        lines.append(f'<tr class="{phase.method}">{body}</tr>')
    return "".join(lines)


def counts(plan: Plan, phase: Phase) -> str:
    """The tokens, and what the phase makes of them, in words."""
    if plan.untouched:
        return f"{plan.tokens:,}, as unpatched"
    return " → ".join((f"{plan.tokens:,}", *phase.stages(plan)))


def pairs(plan: Plan) -> int:
    """Pairs of a query and a key that softmaxes see: the agents with all, and all with them."""
    if plan.agents:
        return 2 * plan.agents * plan.merged_tokens
    return plan.merged_tokens * plan.keys


def notes(phase: Phase, level: Tokens) -> list[str]:
    """Where a phase does not do what its figures say, and why.

    Example:
        >>> phase = Phase(method="merge", sx=2, sy=2, ratio=0.9)
        >>> notes(phase, Tokens(1, 1, phase.plan(64, 64), True))
        ['ratio 0.9 is capped to 0.75: a token of each cell stays']
    """
    if not level.works:
        return ["left alone"] if phase.method != "full" else []
    return phase.caps(level.plan)
