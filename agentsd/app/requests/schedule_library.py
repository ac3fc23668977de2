"""The schedules to choose from, ordered from the closest to the original image to the fastest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from ...errors import ScheduleError
from ...measured import Measured
from ...schedule import Schedule
from ...settings import dump_yaml
from .schedule_text import CUSTOM

MAX_TUNED = 16
"""Maximum schedules read from a folder; the rest are ignored."""


class NamedSchedule(NamedTuple):
    """A schedule and its name."""

    name: str
    schedule: Schedule

    @property
    def measured(self) -> Measured | None:
        """What it brought where it was measured."""
        return next(iter(self.schedule.measured), None)


class ScheduleLibrary:
    """The presets, and the schedules in a folder, such as those of ``agentsd tune``.

    Args:
        folder: Of YAML files; ``None`` for the presets alone.

    Raises:
        ScheduleError: If the folder does not exist or a file in it is not a schedule.
    """

    def __init__(self, folder: Path | None = None) -> None:
        presets = [NamedSchedule(name, Schedule.preset(name)) for name in Schedule.presets()]
        self._all = {named.name: named for named in [*presets, *_read_folder(folder)]}

    def names(self) -> list[str]:
        """From closest to fastest, then those that another one beats in both respects."""
        front, rest = ordered(self._all.values())
        return [named.name for named in [*front, *rest]]

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
        names = (n for n, known in self._all.items() if known.schedule.is_equivalent_to(schedule))
        return next(names, CUSTOM)


def ordered(
    schedules: Iterable[NamedSchedule],
) -> tuple[Sequence[NamedSchedule], Sequence[NamedSchedule]]:
    """Those on the Pareto front, from slow to fast; and the rest."""
    schedules = list(schedules)
    measured = [(m.time, m.psnr, named) for named in schedules if (m := named.measured) and m.psnr]
    front = [
        (time, psnr, named)
        for time, psnr, named in measured
        if not any(t <= time and p >= psnr and (t, p) != (time, psnr) for t, p, _ in measured)
    ]
    names = [named.name for *_, named in front]
    return (
        [named for *_, named in sorted(front, key=lambda row: -row[0])],
        [named for named in schedules if named.name not in names],
    )


def _read_folder(folder: Path | None) -> list[NamedSchedule]:
    if folder is None:
        return []
    if not folder.is_dir():
        raise ScheduleError(f"{folder}: is not a folder of schedules")
    files = sorted(path for path in folder.iterdir() if path.suffix in (".yaml", ".yml"))
    taken = {*Schedule.presets(), CUSTOM}
    return [
        NamedSchedule(
            f"{file.stem} (tuned)" if file.stem in taken else file.stem, Schedule.from_yaml(file)
        )
        for file in files[:MAX_TUNED]
    ]
