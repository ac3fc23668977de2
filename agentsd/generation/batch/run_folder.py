"""The folder of a run: its configuration, its images, and the manifest that vouches for them.

    run.json          the whole configuration; a second run in the folder must have the same
    prompts.jsonl     the checked prompts
    images/           the images
    manifest.jsonl    a line per image, appended once the image is written
    failed.jsonl      a line per image that could not be made, or that a safety checker hid

Where several processes work, each appends to its own files (``manifest.<name>.jsonl``), and the
last to finish, or the next run, merges them into one. A variant of an experiment has a folder of
the same kind, but for ``run.json`` and ``prompts.jsonl``.
"""

from __future__ import annotations

import json
import os
import shutil
import tarfile
import threading
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import ExitStack, suppress
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ...errors import OutputError, SettingsError
from ...settings import short_repr
from ..image_files import PART, prepare_folder, write_whole, writing
from ..images import HIDDEN
from .prompts import PromptList

FAILED_KEYS = (
    *("id", "number", "prompt_index", "image_index", "prompt", "seed"),
    "nsfw_content_detected",
)
"""What ``failed.jsonl`` says of an image that a safety checker hid."""


class RunFolder:
    """One process's view of the folder.

    Args:
        path: The folder.
        name: Of this process among several; empty where there is only one.

    Raises:
        OutputError: By any method, if the folder cannot be read or written.
    """

    def __init__(self, path: Path, name: str = "") -> None:
        self.path = path
        self.images = path / "images"
        self.claims = path / ".claims"
        self.prompts = path / "prompts.jsonl"
        self.run_file = path / "run.json"
        middle = f".{name}" if name else ""
        self._manifest = path / f"manifest{middle}.jsonl"
        self._failures = path / f"failed{middle}.jsonl"
        self._lock = threading.Lock()
        self._read: dict[Path, int] = {}
        self._settled = bytearray()
        self.made = 0
        """Images that are there, as of the last :meth:`poll`."""
        self.failed = 0
        """Images that could not be made or were hidden by a safety checker, likewise."""
        self.hidden = 0
        """Those that were hidden; they are black, and not made again."""

    def prepare(
        self, config: Mapping[str, Any], prompts: PromptList, *, resume: bool
    ) -> dict[str, Any]:
        """Begin a run, or resume one with the same configuration; in one process only.

        Args:
            config: All that the images depend on.
            prompts: The prompts.
            resume: Whether an existing run may be resumed.

        Returns:
            What ``run.json`` held before, empty for a new run.

        Raises:
            SettingsError: If there is a run with another configuration, or one not to be resumed.
        """
        old = self.read_run() if self.run_file.exists() else None
        if old is None:
            if self._parts("manifest") or any(self.images.glob("[!.]*")):
                raise SettingsError(
                    f"{self.path} has images or a manifest but no run.json, so their settings are "
                    "not known; give another --out"
                )
        elif not resume:
            raise SettingsError(f"{self.path} holds a run already; drop --no-resume to continue it")
        elif differences := _differences(old["config"], config):
            raise SettingsError(
                f"{self.path} holds a run with another configuration: {'; '.join(differences)}; "
                "give the same options to continue it, or another --out"
            )
        prepare_folder(self.images)
        with writing(self.prompts) as file:  # anew: these are checked, old ones may be damaged
            shutil.copyfileobj(prompts.file, file)
        self.recover()
        return old or {}

    def recover(self) -> None:
        """Clean up after an interrupted process; images that failed are then missing ones."""
        with suppress(FileNotFoundError):
            shutil.rmtree(self.claims)
        for failed in self._parts("failed"):
            failed.unlink(missing_ok=True)
        self.merge()
        for line in self.lines():
            self._note_hidden(line)

    def read_run(self) -> dict[str, Any]:
        """Read ``run.json``."""
        try:
            run = json.loads(self.run_file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "not JSON"
            raise OutputError(f"{self.run_file}: cannot be read ({reason})") from None
        if not isinstance(run, dict) or not isinstance(run.get("config"), dict):
            raise OutputError(f"{self.run_file}: is not an agentsd run file; give another --out")
        return run

    def describe(self, run: Mapping[str, Any]) -> None:
        """Write ``run.json``."""
        write_whole(self.run_file, json.dumps(run, indent=2, ensure_ascii=False).encode())

    def open(self, total: int) -> None:
        """Start to follow a run of this many images."""
        self._settled = bytearray(total)
        self.poll()

    def save(self, file: str, data: bytes, line: Mapping[str, Any]) -> None:
        """Write an image, and then its line of the manifest."""
        write_whole(self.path / file, data)
        digest = sha256(data).hexdigest()
        self._append(self._manifest, {**line, "file": file, "sha256": digest, "bytes": len(data)})
        self._note_hidden(line)

    def _note_hidden(self, line: Mapping[str, Any]) -> None:
        if line.get("nsfw_content_detected"):
            self.fail({name: line.get(name) for name in FAILED_KEYS} | {"error": HIDDEN})

    def fail(self, line: Mapping[str, Any]) -> None:
        """Record an image that could not be made."""
        self._append(self._failures, line)

    def poll(self) -> None:
        """Read what all processes have done since the last poll."""
        for part in (*self._parts("manifest"), *self._parts("failed")):
            made = part.name.startswith("manifest")
            for start, line in _lines(part, self._read.get(part, 0)):
                self._read[part] = start + len(line)
                number = _number(line)
                if number is not None and number < len(self._settled):
                    fresh = not self._settled[number]
                    hidden = bool(json.loads(line).get("nsfw_content_detected"))
                    good = made and not hidden
                    self.hidden += fresh and hidden
                    self.made += fresh and good
                    self.failed += fresh and not good
                    self._settled[number] = 1

    def is_settled(self, number: int) -> bool:
        """Whether an image is made, or cannot be."""
        return bool(self._settled[number])

    @property
    def is_complete(self) -> bool:
        """Whether all images are settled."""
        return self._settled.find(0) < 0

    def merge(self) -> None:
        """Merge the manifests into one: in order, each image once, no line whose file is gone.

        Half a line or half a file, which a kill may leave, is dropped; its image is made again. No
        other process may be writing. Memory holds only where each line begins.
        """
        for torn in (*self.path.glob(f".*{PART}"), *self.images.glob(f".*{PART}")):
            torn.unlink(missing_ok=True)
        shards = lru_cache(maxsize=4)(self._packed_in)  # the lines come shard by shard
        for kind in ("manifest", "failed"):
            parts = self._parts(kind)
            with ExitStack() as stack:
                found: dict[int, tuple[int, int]] = {}
                for i, part in enumerate(parts):
                    for start, line in _lines(part, 0):
                        number = _number(line)
                        if number is not None and (
                            kind == "failed" or self._is_there(line, shards)
                        ):
                            found[number] = (i, start)
                if not parts:
                    continue
                files = [stack.enter_context(part.open("rb")) for part in parts]
                with writing(self.path / f"{kind}.jsonl") as merged:
                    for number in sorted(found):
                        i, start = found[number]
                        files[i].seek(start)
                        merged.write(files[i].readline())
            for part in parts:
                if part.name != f"{kind}.jsonl":
                    part.unlink(missing_ok=True)

    def lines(self) -> Iterator[dict[str, Any]]:
        """The merged manifest."""
        for _, line in _lines(self.path / "manifest.jsonl", 0):
            yield json.loads(line)

    def _is_there(self, line: bytes, shards: Callable[[str], Set[str]]) -> bool:
        entry = json.loads(line)
        try:
            if "shard_key" in entry:
                return f"{entry['shard_key']}.png" in shards(entry["file"])
            file: Path = self.path / entry["file"]
            size = file.stat().st_size
            return file.is_file() and size == int(entry.get("bytes", size))
        except (OSError, KeyError, TypeError, ValueError):
            return False

    def _packed_in(self, shard: str) -> Set[str]:
        """The names in a shard; none if it is damaged, so that all of it is made again."""
        try:
            with tarfile.open(self.path / shard) as tar:
                return frozenset(tar.getnames())
        except (OSError, tarfile.TarError):
            return frozenset()

    def _parts(self, kind: str) -> list[Path]:
        return sorted({*self.path.glob(f"{kind}.jsonl"), *self.path.glob(f"{kind}.*.jsonl")})

    def _append(self, path: Path, line: Mapping[str, Any]) -> None:
        data = json.dumps(line, ensure_ascii=False).encode() + b"\n"
        try:
            with self._lock, path.open("ab") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


def _lines(path: Path, start: int) -> Iterator[tuple[int, bytes]]:
    """Each whole line from ``start`` on, with the position where it begins."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        file.seek(start)
        for line in file:
            if not line.endswith(b"\n"):
                return
            yield start, line
            start += len(line)


def _number(line: bytes) -> int | None:
    """The number of the image that a line is about; None if the line is broken."""
    try:
        entry = json.loads(line)
        # Experiments of earlier versions have the number as the id alone.
        number = entry["number"] if "number" in entry else entry["id"]
    except (ValueError, TypeError, KeyError):
        return None
    return number if type(number) is int and number >= 0 else None


def _differences(old: Any, new: Any, key: str = "") -> list[str]:
    """Where two configurations differ, as ``key: this there, that here``."""
    if isinstance(old, dict) and isinstance(new, Mapping):
        names = dict.fromkeys((*old, *new))
        inner = (_differences(old.get(n), new.get(n), f"{key}.{n}" if key else n) for n in names)
        return [difference for found in inner for difference in found]
    same = json.dumps(old, sort_keys=True) == json.dumps(new, sort_keys=True)
    return [] if same else [f"{key}: {short_repr(old)} there, {short_repr(new)} here"]


def only_run_in(out: Path) -> Any:
    """Lock a folder against other runs, until the end of a ``with`` block or of the process.

    Raises:
        OutputError: If another run has locked it, or it cannot be written to.
    """
    prepare_folder(out)
    lock = FileLock(out / ".lock")
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        raise OutputError(
            f"another run is using {out}; wait for it, or give another --out"
        ) from None
