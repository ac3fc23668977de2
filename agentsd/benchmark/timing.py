"""Time one call of a UNet: unpatched, under our schedules, under the baselines, and the floor.

Speed may be measured on random weights of a real architecture; similarity may not, and the
distance given here only shows that a variant did something.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from statistics import median, quantiles
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import SettingsError
from ..patching.layers import top_attention_layers
from .cases import MODELS, Case, build
from .stopwatch import STEPS, Stopwatch, Times
from .variants import UNetPatch

NOISY = 0.1
"""Spread of a ratio (interquartile range over median) above which it means little."""

LEAST_SECONDS = 0.5
"""Seconds to time at once, so that what only a first call does counts for little."""

LEAST_SAVING = 0.05
"""Share of the unpatched time that the floor must save for ``removed`` to mean something."""


@dataclass(frozen=True)
class Measurement:
    """A variant's figures; times are medians over the rounds, in seconds per call of the UNet."""

    model: str
    height: int
    width: int
    tokens: int
    """At the highest resolution that has self-attention."""
    batch: int
    dtype: str
    device: str
    threads: int
    compiled: bool
    variant: str
    rounds: int
    seconds: float
    attention_seconds: float
    """Within the self-attention modules of that resolution; 0 where compiled."""
    merging_seconds: float
    """Part of it: in our matching, merging and unmerging."""
    ratio: float
    """Time over unpatched time, the median over the rounds."""
    ratio_low: float
    ratio_high: float
    """Quartiles of the ratio."""
    removed: float | None
    """Share of the removable time that is removed: (T₀ - T) / (T₀ - T_floor); None where there is
    hardly any, less than :data:`LEAST_SAVING` of T₀."""
    peak_mib: float
    """Peak memory of a call in MiB, above what the idle model holds."""
    distance: float
    """Relative L2 distance between its output and the unpatched one."""
    noisy: bool
    launches: int | None
    """Operations that a call launches, without views; ``None`` if the UNet is compiled."""


def run(
    case: Case,
    variants: dict[str, UNetPatch],
    rounds: int,
    note: Callable[[str], None] = lambda _: None,
) -> Iterator[list[Measurement]]:
    """Time the variants in turns; the first call of each warms up and does not count.

    Args:
        case: What to time.
        variants: ``unpatched`` and ``floor`` among them.
        rounds: How many rounds count, at least 1.
        note: Called with what is being done.

    Yields:
        After each round, a measurement of each variant so far: an interruption keeps the last.

    Raises:
        SettingsError: If the case or ``rounds`` is out of range.

    Example:
        >>> from agentsd.benchmark.variants import REFERENCES
        >>> case = Case("pocket", 16, 16)
        >>> *_, measured = run(case, REFERENCES, rounds=1)
        >>> [found.variant for found in measured]
        ['unpatched', 'floor']
    """
    if case.model not in MODELS:
        raise SettingsError(f"no model {case.model!r} to time; there are {', '.join(MODELS)}")
    if rounds < 1 or min(case.height, case.width) < 8 or case.batch < 1:
        raise SettingsError("rounds and batch must be 1 or more, sides of the latents 8 or more")
    note("building the model")
    unet = build(case)
    top = top_attention_layers(unet)[0].downsample
    tokens = -(-case.height // top) * -(-case.width // top)
    if case.compiled:
        # PyTorch 2.6's name for it, which later ones (recompile_limit) still know.
        torch._dynamo.config.cache_size_limit = 8 * len(variants)
        unet.compile()
    watch = Stopwatch(unet, case)
    first_calls = _warm_up(watch, variants, note)
    times: dict[str, list[Times]] = {name: [] for name in variants}
    names = list(variants)
    for number in range(1, rounds + 1):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            note(f"round {number}/{rounds}: {name}")
            with variants[name](unet):
                times[name].append(watch.time(first_calls[name].timed_together))
        yield [_measurement(case, name, tokens, times, first_calls[name]) for name in names]


class _FirstCall(NamedTuple):
    """What a variant's first call shows."""

    peak_mib: float
    distance: float
    timed_together: int
    """How many calls to time at once."""
    launches: int | None = None


def _warm_up(
    watch: Stopwatch, variants: dict[str, UNetPatch], note: Callable[[str], None]
) -> dict[str, _FirstCall]:
    """Call each variant for the first time, which is not timed; ``unpatched`` comes first."""
    found: dict[str, _FirstCall] = {}
    reference: Tensor | None = None
    for name, patch in variants.items():
        note(f"warm-up: {name}")
        with patch(watch.unet):
            begun = time.perf_counter()
            peak, out = watch.peak()
            seconds = time.perf_counter() - begun
            if watch.case.compiled:  # the first call compiled, the next shows how long one takes
                seconds = watch.time(1).total
            launches = watch.launches()
        if reference is None:
            reference = out.float()
        distance = float((out.float() - reference).norm() / reference.norm())
        found[name] = _FirstCall(peak, distance, _calls(seconds), launches)
    return found


def _calls(seconds: float) -> int:
    """How many calls to time at once: :data:`LEAST_SECONDS` of them, at most the steps of a run."""
    return min(max(1, round(LEAST_SECONDS / seconds)), STEPS)


def _measurement(
    case: Case,
    name: str,
    tokens: int,
    times: dict[str, list[Times]],
    first_call: _FirstCall,
) -> Measurement:
    ratios = [a.total / b.total for a, b in zip(times[name], times["unpatched"], strict=True)]
    low, _, high = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    seconds, unpatched, least = (
        median(t.total for t in times[key]) for key in (name, "unpatched", "floor")
    )
    ratio, removable = median(ratios), unpatched - least
    return Measurement(
        **asdict(case),
        tokens=tokens,
        threads=torch.get_num_threads(),
        variant=name,
        rounds=len(ratios),
        seconds=seconds,
        attention_seconds=median(t.attention for t in times[name]),
        merging_seconds=median(t.merging for t in times[name]),
        ratio=ratio,
        ratio_low=low,
        ratio_high=high,
        removed=(unpatched - seconds) / removable if removable > LEAST_SAVING * unpatched else None,
        peak_mib=first_call.peak_mib,
        distance=first_call.distance,
        noisy=len(ratios) > 1 and (high - low) / ratio > NOISY,
        launches=first_call.launches,
    )
