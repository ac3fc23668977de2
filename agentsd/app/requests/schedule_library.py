"""The schedules to choose from, ordered from the closest to the original image to the fastest."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from ...errors import ScheduleError
from ...schedule import PRESETS, Schedule
from ...settings import dump_yaml
from ...text_files import read_text
from .schedule_text import CUSTOM

TIME = re.compile(r"(\d+(?:\.\d+)?) % of the unpatched time")
SPEED = re.compile(r"(\d+(?:\.\d+)?)\s*[×x] (?:as fast|faster)")
PSNR = re.compile(r"(\d+(?:\.\d+)?) dB")
"""How the comments of a schedule's file state measurements."""

MAX_TUNED = 16
"""Maximum schedules read from a folder; the rest are ignored."""


class NamedSchedule(NamedTuple):
    """A schedule with its measurements."""

    name: str
    schedule: Schedule
    time: float | None
    """Share of the unpatched time, from the comments of its file."""
    psnr: float | None
    """PSNR of its images to the unpatched ones, in dB, likewise."""
    about: str
    """The comments of its file."""


class ScheduleLibrary:
    """The presets, and the schedules in a folder, such as those of ``agentsd tune``.

    Args:
        folder: Of YAML files; ``None`` for the presets alone.

    Raises:
        ScheduleError: If the folder does not exist or a file in it is not a schedule.
    """

    def __init__(self, folder: Path | None = None) -> None:
        presets = [read_named(PRESETS / f"{name}.yaml") for name in Schedule.presets()]
        self._all = {each.name: each for each in [*presets, *_read_folder(folder)]}

    def names(self) -> list[str]:
        """From closest to fastest, then those that another one beats in both respects."""
        front, rest = ordered(self._all.values())
        return [each.name for each in [*front, *rest]]

    def __getitem__(self, name: str) -> NamedSchedule:
        return self._all[name]

    def __contains__(self, name: object) -> bool:
        return name in self._all

    def text(self, name: str) -> str:
        """A preset's name, or the YAML text of another schedule."""
        presets = Schedule.presets()
        return name if name in presets else dump_yaml(self._all[name].schedule.to_dict())

    def name_of(self, schedule: Schedule) -> str:
        """The name of a schedule in the library; :data:`CUSTOM` if it has none."""
        data = schedule.to_dict()
        found = (each.name for each in self._all.values() if each.schedule.to_dict() == data)
        return next(found, CUSTOM)


def read_named(file: Path) -> NamedSchedule:
    """Read a schedule, and the measurements in the comments of its file.

    Raises:
        ScheduleError: If it is not a schedule.
    """
    schedule = Schedule.from_yaml(file)
    lines = [line.strip() for line in read_text(file, ScheduleError).splitlines()]
    about = " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))
    share, times, psnr = TIME.search(about), SPEED.search(about), PSNR.search(about)
    time = float(share[1]) / 100 if share else 1 / float(times[1]) if times else None
    return NamedSchedule(file.stem, schedule, time, float(psnr[1]) if psnr else None, about)


def ordered(
    schedules: Iterable[NamedSchedule],
) -> tuple[Sequence[NamedSchedule], Sequence[NamedSchedule]]:
    """Those on the Pareto front, from slow to fast; and the rest."""
    measured = [each for each in schedules if each.time and each.psnr]
    front = [each for each in measured if not any(_beats(other, each) for other in measured)]
    names = {each.name for each in front}
    rest = [each for each in schedules if each.name not in names]
    return sorted(front, key=lambda each: -(each.time or 0)), rest


def _beats(one: NamedSchedule, other: NamedSchedule) -> bool:
    mine, yours = (one.time or 0, -(one.psnr or 0)), (other.time or 0, -(other.psnr or 0))
    return mine != yours and mine[0] <= yours[0] and mine[1] <= yours[1]


def _read_folder(folder: Path | None) -> list[NamedSchedule]:
    if folder is None:
        return []
    if not folder.is_dir():
        raise ScheduleError(f"{folder}: is not a folder of schedules")
    files = sorted(path for path in folder.iterdir() if path.suffix in (".yaml", ".yml"))
    taken = {*Schedule.presets(), CUSTOM}
    found = [read_named(file) for file in files[:MAX_TUNED]]
    return [
        each._replace(name=f"{each.name} (tuned)") if each.name in taken else each for each in found
    ]
