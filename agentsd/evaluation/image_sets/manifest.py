"""Manifests: JSON lines with a record of each image."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import EvaluationError
from ...settings import short_repr
from ...text_files import decode_text, split_lines
from .entry import read_bytes

MANIFEST = "manifest.jsonl"


def read_manifest(path: Path, *, growing: bool = False) -> list[dict[str, Any]]:
    """The records of a manifest: JSON objects, one a line, each with at least a ``file``.

    Args:
        path: Path of the manifest.
        growing: Ignore a last line without a line end, which an interrupted run may leave.

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
