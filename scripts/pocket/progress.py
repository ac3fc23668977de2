"""What a run shows: a bar on stderr, a log of figures, grids of pictures."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

_stderr = Console(stderr=True)


def say(text: str) -> None:
    """Print a line to stderr; stdout belongs to results."""
    _stderr.print(text, highlight=False, soft_wrap=True)


class Watch:
    """A stage's bar and its log `work/<stage>.csv`, smoothed for the eye.

    Args:
        stage: names the files.
        work: folder of the run.
        resumed: keep the log that is there.
        every: steps between two lines of the log.
    """

    def __init__(self, stage: str, work: Path, resumed: bool, every: int = 20):
        self.stage, self.every = stage, every
        self.log = work / f"{stage}.csv"
        if not resumed:
            self.log.unlink(missing_ok=True)
        self.sums: dict[str, list[float]] = {}
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:.1f} %"),
        )
        self.bar = Progress(
            *columns, TimeElapsedColumn(), console=_stderr, refresh_per_second=1,
            disable=not _stderr.is_terminal,
        )  # fmt: skip
        self.task = self.bar.add_task(stage, total=1.0)

    def __enter__(self) -> Watch:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def step(self, step: int, seconds: float, progress: float, figures: dict[str, float]) -> None:
        """Take a step's figures; every few steps write their means to the log."""
        for name, value in figures.items():
            self.sums.setdefault(name, []).append(value)
        if step % self.every:
            return
        means = {name: sum(values) / len(values) for name, values in self.sums.items()}
        self.sums = {}
        append(self.log, step, seconds, means)
        text = "  ".join(f"{name} {value:.4g}" for name, value in means.items())
        self.bar.update(self.task, completed=progress, description=f"{self.stage} {step}: {text}")
        if not _stderr.is_terminal:
            say(f"{self.stage} step {step}  {seconds:.0f} s  {progress:.1%}  {text}")


def append(log: Path, step: int, seconds: float, figures: dict[str, float]) -> None:
    """Add figures to a log; its columns are step, seconds of training, name, value."""
    with log.open("a", newline="") as file:
        writer = csv.writer(file)
        for name, value in figures.items():
            writer.writerow([step, f"{seconds:.1f}", name, f"{value:.6g}"])


def save_grid(pictures: np.ndarray, columns: int, path: Path) -> None:
    """Tile uint8 pictures [B, H, W, 3] into one image file (its suffix names the format)."""
    rows = [
        np.concatenate(list(pictures[i : i + columns]), 1) for i in range(0, len(pictures), columns)
    ]
    short = columns - len(pictures) % columns
    if short < columns:
        rows[-1] = np.pad(rows[-1], ((0, 0), (0, short * pictures.shape[2]), (0, 0)))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"part-{path.name}")
    Image.fromarray(np.concatenate(rows)).save(part, quality=88)
    os.replace(part, path)
