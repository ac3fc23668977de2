"""Image sets in webdataset tars."""

from __future__ import annotations

import json
import tarfile
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from ...errors import EvaluationError
from ...text_files import decode_text
from .entry import SUFFIXES, ImageEntry, warn_of_unread_files


def read_tar(path: Path) -> list[ImageEntry]:
    """List the images of an uncompressed tar, with the metadata beside them.

    Raises:
        EvaluationError: If the file is compressed or damaged, a part of it cannot be parsed, or a
            key occurs twice.
    """
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    others: list[str] = []
    try:
        with tarfile.open(path, "r:") as tar:  # images are read in place, so no compression
            for member in tar:
                place = PurePosixPath(member.name)
                key, _, suffix = place.name.partition(".")  # webdataset's rule: the first dot
                if member.isfile() and key:
                    _add(samples, str(place.with_name(key)), f".{suffix.lower()}", member, path)
                elif key and not member.isdir():
                    others.append("link")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise EvaluationError(f"{path} is not a complete, uncompressed tar ({error})") from None
    images = []
    for _, parts in sorted(samples.items()):
        image = next((suffix for suffix in parts if suffix in SUFFIXES), None)
        others += [suffix for suffix in parts if suffix not in (*SUFFIXES, ".txt", ".json")]
        if image:
            member = parts[image]
            read = partial(_extract, path, member)
            images.append(ImageEntry(f"{path}:{member.name}", read, **_metadata(path, parts)))
    warn_of_unread_files(path, others)
    return images


def _add(
    samples: dict[str, dict[str, tarfile.TarInfo]],
    key: str,
    suffix: str,
    member: tarfile.TarInfo,
    path: Path,
) -> None:
    """Add a file to its sample.

    Raises:
        EvaluationError: If the sample already has such a file or image, as after joining shards.
    """
    parts = samples.setdefault(key, {})
    kind = SUFFIXES if suffix in SUFFIXES else (suffix,)
    if other := next((parts[known] for known in kind if known in parts), None):
        raise EvaluationError(
            f"{path}: the key {key!r} occurs twice ({other.name}, {member.name}); give each sample "
            "its own key, or keep shards that use the same keys in separate tars"
        )
    parts[suffix] = member


def _extract(path: Path, member: tarfile.TarInfo) -> bytes:
    with path.open("rb") as file:
        file.seek(member.offset_data)
        return file.read(member.size)


def _metadata(path: Path, parts: dict[str, tarfile.TarInfo]) -> dict[str, Any]:
    """The prompt and model of an image, and whether it is hidden, from the files beside it."""
    record: Any = {}
    if ".json" in parts:
        try:
            record = json.loads(_extract(path, parts[".json"]))
        except ValueError as error:
            place = f"{path}:{parts['.json'].name}"
            raise EvaluationError(f"{place}: not valid JSON ({error})") from None
    if not isinstance(record, dict):
        record = {}
    texts = {key: value for key, value in record.items() if isinstance(value, str)}
    prompt = texts.get("prompt", texts.get("caption"))
    if ".txt" in parts:
        place = f"{path}:{parts['.txt'].name}"
        text = decode_text(_extract(path, parts[".txt"]), place, EvaluationError)
        prompt = text.strip() or None
    hidden = bool(record.get("nsfw_content_detected"))
    return {"prompt": prompt, "model": texts.get("model"), "hidden": hidden}
