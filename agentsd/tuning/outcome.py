"""What tuning found, as figures, words and a schedule file."""

from __future__ import annotations

import math
from textwrap import wrap
from typing import Any

from ..evaluation.intervals import Interval, bootstrap, small_sample_warning
from ..evaluation.summary import interval_to_json, pareto_front
from ..generation.records import VERSIONS
from ..measured import Measured, TunedFor
from ..schedule import Schedule
from .budget import SHARE, SPEED, Budget
from .candidates import describe
from .judgement import UNPATCHED, faster_by, judge
from .race import Entry
from .tuner import CHOSEN, Tuner

NUMBERS = ("num_inference_steps", "guidance_scale")
WIDTH = 98
"""Characters in a line of comment."""


def figures(tuner: Tuner, conditions: TunedFor, *, stopped: bool) -> dict[str, Any]:
    """All figures of a tuning run that has a best schedule, as plain values for JSON.

    Args:
        tuner: After its stages, or those that it came to.
        conditions: What it tuned for.
        stopped: Whether someone stopped it.
    """
    budget, race, best = tuner.budget, tuner.race, tuner.best()
    assert race is not None
    assert best is not None
    entries = list(race.entries.values())
    whole = [entry for entry in entries if race.is_known(entry)]
    chosen = best.name if best.predicted is None else CHOSEN
    table = {chosen if entry is best else entry.name: _tuning_row(entry, tuner) for entry in whole}
    front = pareto_front(_higher_is_better(table, budget), budget.likeness)
    preset = tuner.best_preset()
    found: dict[str, Any] = {
        "budget": str(budget),
        "tuned_for": conditions.model_dump(),
        "made_with": VERSIONS,
        "schedule": best.schedule.to_dict(),
        "chosen": chosen,
        "is_preset": best.predicted is None,
        "met_on_tuning_images": race.meets(best),
        "best_preset": preset and preset.name,
        "best_preset_meets": preset is not None and race.meets(preset),
        "variants": table,
        "front": front,
        "images": {"tuning": race.first, "held_out": len(tuner.judged)},
        "made": sum(len(entry.values) for entry in race.entries.values()),
        "raced": sum(bool(entry.values) for entry in race.entries.values()),
        "candidates_run": sum(bool(e.values) and e.predicted is not None for e in entries),
        "screened": sum(e.predicted is not None for e in entries),
        "held_out": _held_out(tuner),
        "seconds": tuner.clock.seconds,
        "stopped": stopped,
    }
    found["words"] = words(found, budget)
    return found


def _tuning_row(entry: Entry, tuner: Tuner) -> dict[str, Any]:
    budget, race = tuner.budget, tuner.race
    assert race is not None
    prompts = [settings.prompt for settings in tuner.images.tuning[: race.first]]
    first = [entry.values[image] for image in range(race.first)]  # so that all have the same
    values = list(entry.values.values())
    return {
        "time": {"mean": entry.time, "low": None, "high": None},
        budget.likeness: interval_to_json(bootstrap(first, prompts)[0]),
        "worst": max(values) if budget.likeness == "lpips" else min(values),
        "met": None if budget.metric == SPEED else sum(map(budget.is_met, values)),
        "images": len(values),
        "what": describe(entry.schedule),
    }


def _higher_is_better(table: dict[str, Any], budget: Budget) -> dict[str, Any]:
    if budget.likeness != "lpips":
        return table
    return {name: row | {"lpips": {"mean": -row["lpips"]["mean"]}} for name, row in table.items()}


def _held_out(tuner: Tuner) -> dict[str, Any]:
    """What the held-out images say of each variant that they were made with."""
    if not tuner.judged:
        return {}
    judged, budget = tuner.judged, tuner.budget
    prompts = [settings.prompt for settings in tuner.images.held_out[: len(judged)]]
    names = [name for name in judged[0] if name != UNPATCHED]
    chosen, found = names[0], {}
    for name in names:
        row = judge(judged, prompts, name, budget)
        if name != chosen:
            row["tuned_is_faster_by"] = faster_by(judged, prompts, chosen, name)
        found[name] = {
            key: interval_to_json(value) if isinstance(value, Interval) else value
            for key, value in row.items()
        }
    return found | {"warning": small_sample_warning(prompts)}


def words(found: dict[str, Any], budget: Budget) -> list[str]:
    """What was found and why, in sentences."""
    chosen = found["chosen"]
    row = found["variants"][chosen]
    is_preset = found["is_preset"]
    kind = f"the preset {chosen}" if is_preset else "a tuned schedule"
    lines = [f"Chosen for {budget}: {kind} ({row['what']})."]
    count = row["images"]
    if not found["met_on_tuning_images"]:
        lines.append("Nothing that was tried meets the budget; this comes closest.")
    elif budget.metric == SPEED:
        lines.append(f"Of all that are that fast, it is the closest on {count} tuning images.")
    else:
        lines.append(
            f"Of {found['raced']} schedules that were run it is the fastest of which so many "
            f"tuning images meet the budget ({row['met']} of {count}, the worst: "
            f"{budget.shown(row['worst'])}), and by such a margin, that nine in ten new ones "
            "should."
        )
    if found["stopped"]:
        lines.append("Tuning was stopped before its end.")
    held_out = found["held_out"]
    if not held_out:
        return [*lines, "Not judged on held-out images: these figures are of the tuning images."]
    lines.append(_verdict(chosen, held_out[chosen], budget))
    preset = found["best_preset"]
    if preset != chosen and preset in held_out:
        lines.append(_verdict(preset, held_out[preset], budget))
        faster = held_out[preset]["tuned_is_faster_by"]
        if found["best_preset_meets"]:
            kind = "the best preset for this budget"
        else:
            kind = "the preset that comes closest to the budget; none that was run whole meets it"
            seen = found["variants"].get(preset, {})
            if seen.get("met") is not None:
                kind += f" ({preset} on {seen['met']} of {seen['images']} tuning images)"
        lines.append(
            f"The tuned schedule takes {_percent(faster)} less time than {preset}, {kind}."
        )
    elif is_preset and found["met_on_tuning_images"]:
        lines.append(
            f"None of {found['screened']} candidates that were screened and "
            f"{found['candidates_run']} that were run beats it: the preset is on the front."
        )
    if held_out["warning"]:
        lines.append(f"Mind: {held_out['warning']}.")
    return lines


def _verdict(name: str, row: dict[str, Any], budget: Budget) -> str:
    time, likeness = row["time"], row[budget.likeness]
    wanted = math.ceil(SHARE * row["images"])
    share = {key: 100 * value for key, value in row["met_share"].items()}
    text = (
        f"On {row['images']} held-out images, {name} takes {_percent(time)} of the unpatched time "
        f"at {budget.shown(likeness['mean'])} {_ends(likeness, 1)}; {row['met']} of "
        f"{row['images']} meet the budget [{share['low']:.0f} %, {share['high']:.0f} %]"
    )
    if row["met"] < wanted:
        text += f", fewer than the {wanted} wanted"
    if row["short"]:
        unit = "×" if budget.metric == SPEED else ""
        text += f"; the worst misses it by {row['short']:.3g}{unit}"
        text += " dB" if budget.metric == "psnr" else ""
    return text + "."


def _percent(interval: dict[str, Any]) -> str:
    return f"{100 * interval['mean']:.3g} % {_ends(interval, 100)}"


def _ends(interval: dict[str, Any], scale: float) -> str:
    low, high = interval["low"], interval["high"]
    return "[?]" if low is None else f"[{scale * low:.4g}, {scale * high:.4g}]"


def tuned_yaml(found: dict[str, Any]) -> str:
    """The schedule as YAML, with what was found in comments, its figures and conditions."""
    row = found["held_out"].get(found["chosen"]) or found["variants"][found["chosen"]]
    conditions = TunedFor(**found["tuned_for"])
    shared = conditions.model_dump(include={"model", "scheduler", *NUMBERS})
    likeness = {name: row[name]["mean"] for name in ("psnr", "ssim", "lpips") if name in row}
    measured = Measured(time=row["time"]["mean"], images=row["images"], **likeness, **shared)
    tuned = Schedule(**found["schedule"] | {"tuned_for": conditions, "measured": [measured]})
    versions = ", ".join(f"{name} {version}" for name, version in found["made_with"].items())
    head = ["Found by agentsd tune.", *found["words"], f"With {versions}."]
    lines = [part for line in head for part in wrap(line, WIDTH)]
    return "".join(f"# {line}\n" for line in lines) + tuned.to_yaml()
