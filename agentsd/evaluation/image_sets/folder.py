"""Image sets in folders: plain ones, those with a manifest, and runs of ``agentsd generate``."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ...errors import EvaluationError
from ...files import files_below
from ...settings import short_repr
from ...text_files import decode_text, read_text, split_lines
from .entry import SUFFIXES, ImageEntry, read_bytes, warn_of_unread_files
from .tar import read_tar


def read_folder(folder: Path) -> list[ImageEntry]:
    """List the images below a folder, with prompts from ``NAME.txt`` beside them.

    Raises:
        EvaluationError: If a folder or prompt cannot be read.
    """
    try:
        files = sorted(files_below(folder))
    except OSError as error:
        raise EvaluationError(f"{error.filename}: cannot be read ({error.strerror})") from None
    images = [file for file in files if file.suffix.lower() in SUFFIXES]
    others = {file for file in files if file.suffix.lower() != ".txt"} - {*images}
    warn_of_unread_files(folder, [file.suffix.lower() or file.name for file in others])
    return [ImageEntry(str(file), partial(read_bytes, file), _prompt(file)) for file in images]


def _prompt(image: Path) -> str | None:
    text = image.with_suffix(".txt")
    return read_text(text, EvaluationError).strip() or None if text.is_file() else None


MANIFEST = "manifest.jsonl"


def read_manifest(path: Path, *, growing: bool = False) -> list[dict[str, Any]]:
    """The records of a manifest: JSON objects, one per line, each with at least a ``file``.

    Args:
        path: Path of the manifest.
        growing: Ignore an incomplete last line, which an interrupted run may leave.

    Raises:
        EvaluationError: Names the file and the line.
    """
    records = []
    for number, record in json_lines(path, growing):
        if not isinstance(record, dict) or not isinstance(record.get("file"), str):
            raise EvaluationError(
                f"{path}, line {number}: expected an object with a file (got {short_repr(record)})"
            )
        records.append(record)
    return records


def json_lines(path: Path, growing: bool) -> Iterator[tuple[int, Any]]:
    """The values in a file of JSON lines, each with its line number.

    Raises:
        EvaluationError: Names the file and the line.
    """
    data = read_bytes(path)
    if growing:
        data = data[: data.rfind(b"\n") + 1]
    lines = split_lines(decode_text(data, str(path), EvaluationError))
    for number, line in enumerate(lines, start=1):
        try:
            yield number, json.loads(line)
        except ValueError as error:
            raise EvaluationError(
                f"{path}, line {number}: {error} (got {short_repr(line)})"
            ) from None


RUN = "run.json"
"""File in which ``agentsd generate`` describes a run, which may be unfinished."""


def is_run_or_manifest(folder: Path) -> bool:
    """Whether a folder is a run, or has a manifest."""
    return bool(_parts(folder, "manifest")) or (folder / RUN).is_file()


def read_run(folder: Path, unfinished: bool) -> list[ImageEntry]:
    """List the images in a folder's manifest, with their prompts and seeds.

    Args:
        folder: The folder.
        unfinished: Accept an unfinished run, with a warning; otherwise it is an error.

    Raises:
        EvaluationError: If the manifest or the run is broken, or the run is unfinished.
    """
    is_run = (folder / RUN).is_file()
    parts = _parts(folder, "manifest")
    records = [record for part in parts for record in read_manifest(part, growing=is_run)]
    if is_run:
        records = _run_records(folder, records, unfinished)
    images = []
    shards: dict[Path, dict[str, ImageEntry]] = {}
    for record in records:
        file = folder / record["file"]
        image = ImageEntry(str(file), partial(read_bytes, file))
        if "shard_key" in record:
            if file not in shards:
                shards[file] = {image.name: image for image in read_tar(file)}
            name = f"{file}:{record['shard_key']}.png"
            if name not in shards[file]:
                raise EvaluationError(f"{name}: listed in the manifest but not in the shard")
            image = shards[file][name]
        known: Any = {name: record.get(name) for name in ("prompt", "seed", "model")}
        hidden = bool(record.get("nsfw_content_detected"))
        images.append(image._replace(digest=record.get("sha256"), hidden=hidden, **known))
    return images


def _parts(folder: Path, kind: str) -> list[Path]:
    """Files of one kind in a run: a single one, or one per process until the run is finished."""
    return sorted({*folder.glob(f"{kind}.jsonl"), *folder.glob(f"{kind}.*.jsonl")})


def _run_records(
    folder: Path, records: list[dict[str, Any]], unfinished: bool
) -> list[dict[str, Any]]:
    """The records of a run of ``agentsd generate``, in order, each image once.

    Raises:
        EvaluationError: If images are missing, and an unfinished run is not accepted.
    """
    failures = [line for part in _parts(folder, "failed") for line in json_lines(part, True)]
    try:
        total = int(json.loads(read_bytes(folder / RUN))["config"]["images"])
        made = {int(record["number"]): record for record in records}
        failed = {int(failure["number"]) for _, failure in failures} - made.keys()
    except (KeyError, TypeError, ValueError) as error:
        raise EvaluationError(f"{folder}: not a run of agentsd generate ({error!r})") from None
    if failed:
        warnings.warn(
            f"{folder}: images left out because they could not be made: {len(failed)} of {total}; "
            "failed.jsonl says why",
            stacklevel=2,
        )
    if missing := total - len(made) - len(failed):
        problem = f"{folder}: the run is unfinished; images missing: {missing} of {total}"
        if not unfinished:
            raise EvaluationError(
                f"{problem}; start agentsd generate again with the same options to make them, "
                "or measure the existing ones with --unfinished"
            )
        warnings.warn(problem, stacklevel=2)
    return [made[number] for number in sorted(made)]
