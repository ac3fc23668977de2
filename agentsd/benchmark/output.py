"""What a benchmark writes: a table for the terminal, a CSV file, and a plot."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, fields
from itertools import groupby
from pathlib import Path

import torch
from rich.table import Table

from ..errors import MissingPackageError
from ..generation.records import VERSIONS
from ..models.devices import device_name
from .timing import LEAST_SAVING, Measurement
from .variants import BASELINES, run_seconds


def table(rows: Sequence[Measurement]) -> Table:
    """The measurements for a terminal."""
    found = Table(
        caption="medians; % of the unpatched time, with quartiles; ~: too noisy to mean much"
    )
    names = ("tokens", "variant", "s/call", "%", "quartiles", "speed-up", "removed", "launches")
    for name in (*names, "MiB", "apart"):
        found.add_column(name, justify="left" if name == "variant" else "right", no_wrap=True)
    noisy_floor = {row.tokens: row.noisy for row in rows if row.variant == "floor"}
    for row in rows:
        removed = "–"
        if row.removed is not None:
            removed = f"{'~' if row.noisy or noisy_floor[row.tokens] else ''}{row.removed:.2f}"
        found.add_row(
            f"{row.tokens:,}",
            row.variant,
            f"{row.seconds:.3f}",
            f"{'~' if row.noisy else ''}{100 * row.ratio:.1f}",
            f"{100 * row.ratio_low:.1f}-{100 * row.ratio_high:.1f}",
            f"{1 / row.ratio:.2f}x",
            removed,
            "–" if row.launches is None else f"{row.launches:,}",
            f"{row.peak_mib:,.0f}",
            f"{row.distance:.3f}",
        )
    return found


def removed_note(rows: Sequence[Measurement]) -> str | None:
    """Why ``removed`` is missing; None where it is not."""
    sizes = sorted({row.tokens for row in rows if row.removed is None})
    if not sizes:
        return None
    return (
        f"no 'removed' at {', '.join(f'{tokens:,}' for tokens in sizes)} tokens: even the floor, "
        f"without this self-attention, saves less than {LEAST_SAVING:.0%} of the time"
    )


def write_csv(rows: Sequence[Measurement], path: Path, command: str) -> None:
    """Write the measurements under a comment with the command, the machine and the versions."""
    with path.open("w", newline="", encoding="utf-8") as file:
        file.write(f"# {command}\n# {machine()}\n")
        writer = csv.DictWriter(file, [field.name for field in fields(Measurement)])
        writer.writeheader()
        for row in rows:
            shown = asdict(row).items()
            writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in shown})


def machine() -> str:
    """The CPU, the GPU and the versions of the libraries, in one line."""
    cpu = device_name(torch.device("cpu"))
    gpu = f", {device_name(torch.device('cuda'))}" if torch.cuda.is_available() else ""
    versions = ", ".join(f"{name} {version}" for name, version in VERSIONS.items())
    return f"{cpu}{gpu}, {versions}"


def runs(rows: Sequence[Measurement], schedules: Sequence[str], num_steps: int) -> list[str]:
    """A line for each case and schedule: how much faster a whole run is, without text and VAE."""
    lines = []
    for key, found in groupby(rows, lambda row: (row.model, row.height, row.width)):
        seconds = {row.variant: row.seconds for row in found}
        for name in schedules:
            ratio = num_steps * seconds["unpatched"] / run_seconds(name, seconds, num_steps)
            lines.append(f"{key[0]} {key[1]}x{key[2]}, {num_steps} steps, {name}: {ratio:.2f}x")
    return lines


def plot(rows: Sequence[Measurement], path: Path) -> None:
    """Plot time against tokens on logarithmic axes, with each variant's slope.

    Raises:
        MissingPackageError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError("matplotlib", "a plot", "benchmark") from error

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(row.variant for row in rows):
        found = sorted((row.tokens, row.seconds) for row in rows if row.variant == name)
        slope = ""
        if len(found) > 1:
            (a, s), (b, t) = found[0], found[-1]
            exponent = torch.tensor(t / s).log() / torch.tensor(b / a).log()
            slope = f", slope {exponent:.2f}"
        line = "o:" if name in BASELINES else "o-"
        axes.plot(*zip(*found, strict=True), line, label=name + slope)
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="seconds per call")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=110)
