"""The result of tuning: judged on held-out images, as figures, as text and as a schedule file."""

from __future__ import annotations

import math
from statistics import NormalDist
from textwrap import wrap
from typing import Any

import numpy as np

from ..evaluation.intervals import Interval, bootstrap, small_sample_warning
from ..evaluation.protocol import UNPATCHED
from ..evaluation.summary import interval_to_json, pareto_front
from ..generation.records import VERSIONS
from ..measured import Measured, TunedFor
from ..schedule import Schedule
from .budget import SHARE, SPEED, Budget
from .candidates import describe
from .race import RaceEntry
from .tuner import CHOSEN, Tuner

Judged = list[dict[str, dict[str, float]]]
"""For each image, for each variant, its ``seconds`` and similarities."""

NUMBERS = ("num_inference_steps", "guidance_scale")
WIDTH = 98
"""Maximum length of a comment line."""


def figures(tuner: Tuner, conditions: TunedFor, *, stopped: bool) -> dict[str, Any]:
    """All figures of a tuning run with a best schedule, as plain values for JSON.

    Args:
        tuner: The tuner, after its last stage.
        conditions: The conditions that it tuned for.
        stopped: Whether it was stopped early.
    """
    budget, race, best = tuner.budget, tuner.race, tuner.best()
    assert race is not None
    assert best is not None
    entries = list(race.entries.values())
    whole = [entry for entry in entries if race.is_known(entry)]
    chosen = best.name if best.predicted is None else CHOSEN
    table = {chosen if entry is best else entry.name: _tuning_row(entry, tuner) for entry in whole}
    front = pareto_front(_higher_is_better(table, budget), budget.similarity)
    preset = tuner.best_preset()
    result: dict[str, Any] = {
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
    result["words"] = words(result, budget)
    return result


def _tuning_row(entry: RaceEntry, tuner: Tuner) -> dict[str, Any]:
    budget, race = tuner.budget, tuner.race
    assert race is not None
    prompts = [settings.prompt for settings in tuner.images.tuning[: race.first]]
    first = [entry.values[image] for image in range(race.first)]  # the same for all
    values = list(entry.values.values())
    return {
        "time": {"mean": entry.time, "low": None, "high": None},
        budget.similarity: interval_to_json(bootstrap(first, prompts)[0]),
        "worst": max(values) if budget.similarity == "lpips" else min(values),
        "met": None if budget.metric == SPEED else sum(map(budget.is_met, values)),
        "images": len(values),
        "what": describe(entry.schedule),
    }


def _higher_is_better(table: dict[str, Any], budget: Budget) -> dict[str, Any]:
    if budget.similarity != "lpips":
        return table
    return {name: row | {"lpips": {"mean": -row["lpips"]["mean"]}} for name, row in table.items()}


def _held_out(tuner: Tuner) -> dict[str, Any]:
    """Results of each variant on the held-out images."""
    if not tuner.judged:
        return {}
    judged, budget = tuner.judged, tuner.budget
    prompts = [settings.prompt for settings in tuner.images.held_out[: len(judged)]]
    names = [name for name in judged[0] if name != UNPATCHED]
    chosen, rows = names[0], {}
    for name in names:
        row = judge(judged, prompts, name, budget)
        if name != chosen:
            row["tuned_is_faster_by"] = faster_by(judged, prompts, chosen, name)
        rows[name] = {
            key: interval_to_json(value) if isinstance(value, Interval) else value
            for key, value in row.items()
        }
    return rows | {"warning": small_sample_warning(prompts)}


def judge(judged: Judged, prompts: list[str], name: str, budget: Budget) -> dict[str, Any]:
    """Judge a variant on held-out images.

    Args:
        judged: At least one image.
        prompts: The prompt of each image; images of the same prompt are correlated.
        name: The variant.
        budget: The budget that it must meet.

    Returns:
        ``time`` (as a share of the unpatched run's) and the budget's similarity with their 95 %
        intervals, the values of both, ``images``, how many of them ``met`` the budget with the
        interval of that share, and by how much the worst misses it (``short``; 0 if it does not).
    """
    times = [image[name]["seconds"] / image[UNPATCHED]["seconds"] for image in judged]
    values = [image[name][budget.similarity] for image in judged]
    time, similarity = bootstrap(np.stack([times, values], 1), prompts)
    bounded = [1 / time for time in times] if budget.metric == SPEED else values
    met = sum(map(budget.is_met, bounded))
    worst = max(bounded) if budget.metric == "lpips" else min(bounded)
    return {
        "time": time,
        budget.similarity: similarity,
        "values": {"time": times, budget.similarity: values},
        "images": len(judged),
        "met": met,
        "met_share": share_interval(met, len(judged)),
        "worst": worst,
        "short": 0.0 if budget.is_met(worst) else abs(worst - budget.bound),
    }


def share_interval(count: int, total: int, level: float = 0.95) -> Interval:
    """A proportion with its confidence interval (Wilson, 1927).

    Example:
        >>> [round(end, 2) for end in share_interval(9, 10)]
        [0.9, 0.6, 0.98]
    """
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, spread = count / total, z**2 / total
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * np.sqrt(share * (1 - share) / total + spread / total / 4)
    return Interval(share, float(middle - half), float(middle + half))


def faster_by(judged: Judged, prompts: list[str], name: str, than: str) -> Interval:
    """Time that a variant saves over another, as a share of the other's time; paired by image."""
    saved = [1 - image[name]["seconds"] / image[than]["seconds"] for image in judged]
    return bootstrap(saved, prompts)[0]


def words(result: dict[str, Any], budget: Budget) -> list[str]:
    """The result and the reasons for it, in sentences."""
    chosen = result["chosen"]
    row = result["variants"][chosen]
    is_preset = result["is_preset"]
    kind = f"the preset {chosen}" if is_preset else "a tuned schedule"
    lines = [f"Chosen for {budget}: {kind} ({row['what']})."]
    count = row["images"]
    if not result["met_on_tuning_images"]:
        lines.append("None of the schedules tried meets the budget; this one comes closest.")
    elif budget.metric == SPEED:
        lines.append(
            f"On {count} tuning images, it is the closest schedule that meets the speed budget."
        )
    else:
        lines.append(
            f"Of {result['raced']} schedules that were run, it is the fastest with enough margin "
            f"that about 9 in 10 new images should meet the budget; {row['met']} of {count} tuning "
            f"images do (the worst: {budget.shown(row['worst'])})."
        )
    if result["stopped"]:
        lines.append("Tuning was stopped early.")
    held_out = result["held_out"]
    if not held_out:
        return [*lines, "Not judged on held-out images: these figures come from the tuning images."]
    lines.append(_verdict(chosen, held_out[chosen], budget))
    preset = result["best_preset"]
    if preset != chosen and preset in held_out:
        lines.append(_verdict(preset, held_out[preset], budget))
        faster = held_out[preset]["tuned_is_faster_by"]
        if result["best_preset_meets"]:
            kind = "the best preset for this budget"
        else:
            kind = "the preset closest to the budget; none measured in full meets it"
            seen = result["variants"].get(preset, {})
            if seen.get("met") is not None:
                kind += f" ({preset} on {seen['met']} of {seen['images']} tuning images)"
        lines.append(
            f"The tuned schedule takes {_percent(faster)} less time than {preset}, {kind}."
        )
    elif is_preset and result["met_on_tuning_images"]:
        lines.append(
            f"No candidate beats this preset ({result['screened']} were screened, "
            f"{result['candidates_run']} were run)."
        )
    if held_out["warning"]:
        lines.append(f"Note: {held_out['warning']}.")
    return lines


def _verdict(name: str, row: dict[str, Any], budget: Budget) -> str:
    time, similarity = row["time"], row[budget.similarity]
    wanted = math.ceil(SHARE * row["images"])
    share = {key: 100 * value for key, value in row["met_share"].items()}
    text = (
        f"On {row['images']} held-out images, {name} takes {_percent(time)} of the unpatched time "
        f"at {budget.shown(similarity['mean'])} {_ends(similarity, 1)}; {row['met']} of "
        f"{row['images']} meet the budget [{share['low']:.0f} %, {share['high']:.0f} %]"
    )
    if row["met"] < wanted:
        text += f", fewer than the required {wanted}"
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


def tuned_yaml(result: dict[str, Any]) -> str:
    """The schedule as YAML, with its figures and conditions, and the result in comments."""
    row = result["held_out"].get(result["chosen"]) or result["variants"][result["chosen"]]
    conditions = TunedFor(**result["tuned_for"])
    shared = conditions.model_dump(include={"model", "scheduler", *NUMBERS})
    similarity = {name: row[name]["mean"] for name in ("psnr", "ssim", "lpips") if name in row}
    measured = Measured(time=row["time"]["mean"], images=row["images"], **similarity, **shared)
    tuned = Schedule(**result["schedule"] | {"tuned_for": conditions, "measured": [measured]})
    versions = ", ".join(f"{name} {version}" for name, version in result["made_with"].items())
    head = ["Found by agentsd tune.", *result["words"], f"With {versions}."]
    lines = [part for line in head for part in wrap(line, WIDTH)]
    return "".join(f"# {line}\n" for line in lines) + tuned.to_yaml()
