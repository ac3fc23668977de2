"""Fingerprints of the files that an image depends on: SHA-256, or the commit on the hub."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HUB_CACHE

from ..errors import SettingsError
from ..files import file_state, files_below

COMMIT = re.compile(r"[0-9a-f]{40}")


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal; cached until the file changes."""
    return _hashed(str(Path(path).resolve()), file_state(path))


def fingerprint(source: str | Path, revision: str | None = None) -> str | None:
    """A fingerprint of weights, which changes when they change.

    Args:
        source: A file, a folder, or the id of a repository on the Hugging Face hub.
        revision: Branch, tag or commit, on the hub.

    Returns:
        SHA-256 of a file, or of the names and hashes of a folder's weights and configurations;
        the commit of the hub's snapshot, or None if it is not in the hub's cache.
    """
    path = Path(source)
    if os.path.isfile(path):  # unlike Path.is_file, no error for a name that is too long
        return file_sha256(path)
    if os.path.isdir(path):
        files = sorted(file for file in files_below(path) if file.suffix in WEIGHTS)
        digest = hashlib.sha256()
        for file in files:
            line = f"{file.relative_to(path).as_posix()} {file_sha256(file)}\n"
            digest.update(line.encode())
        return digest.hexdigest()
    return snapshot_commit(str(source), revision)


def snapshot_commit(repository: str, revision: str | None = None) -> str | None:
    """The commit of a repository's latest snapshot in the hub's cache; None if there is none."""
    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    owner_and_name = "/".join(repository.split("/")[:2])  # a file in it may follow
    folder = "models--" + owner_and_name.replace("/", "--")
    try:
        return (Path(HF_HUB_CACHE) / folder / "refs" / (revision or "main")).read_text().strip()
    except OSError:
        return revision


def check_unchanged(known: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Compare recorded fingerprints with those of the current files.

    Args:
        known: By path or id, from the record; None where a fingerprint is unknown.
        now: Likewise, of the current files.

    Raises:
        SettingsError: Names the first file that has changed.
    """
    for source, then in known.items():
        if None not in (then, now.get(source)) and now[source] != then:
            raise SettingsError(
                f"{source} is not what the image was made with (sha256 or commit {then} then, "
                f"{now[source]} now); put the file back, or make a new image with its settings"
            )


WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".json", ".txt", ".model")


@lru_cache(maxsize=4096)
def _hashed(path: str, _state: tuple[int, ...]) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
