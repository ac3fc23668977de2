"""The folder of a tuning run, which keeps all measurements so that the run can be resumed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import SettingsError
from ..generation.image_files import prepare_folder, save_image, write_whole
from ..generation.images import TimedImage
from ..settings import short_repr
from .trajectories import Trajectory

SETTINGS = "settings.json"


class Workspace:
    """The folder of all measurements of a tuning run.

    Args:
        folder: Created if missing.
        settings: Everything that the measurements depend on, as JSON values.
        resume: Whether the folder may already hold a run, which must have the same settings.

    Raises:
        SettingsError: If it holds a run and ``resume`` is false, or if that run had other settings.
        OutputError: If the folder cannot be written to.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], *, resume: bool) -> None:
        self.folder = folder
        file = folder / SETTINGS
        settings = json.loads(json.dumps(settings))
        if file.exists():
            if not resume:
                raise SettingsError(
                    f"{folder} already holds a tuning run; resume it (--resume), or write to "
                    "another --out"
                )
            _check_same(file, settings)
        prepare_folder(folder)
        write_whole(file, json.dumps(settings, indent=1).encode())

    def save_image(self, name: str, made: TimedImage) -> None:
        """Save an image and the seconds that it took."""
        save_image(made.image, self.folder / f"{name}.png")
        self.append("images", {"name": name, "seconds": made.seconds})

    def images(self) -> dict[str, TimedImage]:
        """The saved images by name, with their seconds."""
        images = {}
        for line in self.lines("images"):
            file = self.folder / f"{line['name']}.png"
            if file.exists():
                with Image.open(file) as image:
                    images[line["name"]] = TimedImage(image.convert("RGB"), line["seconds"])
        return images

    def trajectory_file(self, number: int) -> Path:
        """File of an image's trajectory."""
        return self.folder / f"trajectory-{number}.pt"

    def trajectories(self) -> dict[int, Trajectory]:
        """The saved trajectories, by the number of their image."""
        files = {int(f.stem.partition("-")[2]): f for f in self.folder.glob("trajectory-*.pt")}
        return {number: Trajectory.load(file) for number, file in sorted(files.items())}

    def append(self, name: str, line: dict[str, Any]) -> None:
        """Append a line to a JSON Lines file."""
        with (self.folder / f"{name}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def lines(self, name: str) -> Iterator[dict[str, Any]]:
        """The lines of a JSON Lines file, skipping incomplete ones."""
        file = self.folder / f"{name}.jsonl"
        if not file.exists():
            return
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                continue


def _check_same(file: Path, settings: dict[str, Any]) -> None:
    try:
        then = json.loads(file.read_bytes())
    except ValueError:
        raise SettingsError(f"{file} is broken; write to another --out") from None
    for key, value in settings.items():
        if then.get(key) != value:
            raise SettingsError(
                f"{file.parent} holds a tuning run with another {key} "
                f"({short_repr(then.get(key))}, now {short_repr(value)}); write to another --out"
            )
