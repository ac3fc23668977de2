"""Pack the images of a finished run into tar files that the ``webdataset`` library reads."""

from __future__ import annotations

import json
import tarfile
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import Any

from ...errors import OutputError
from ..image_files import writing
from .run_folder import RunFolder

SHARD = 1000
"""Images in a shard."""


def pack(folder: RunFolder) -> None:
    """Move a run's images into ``shards/000000.tar``, …, and update its manifest.

    Members of an image share a key: ``KEY.png``, ``KEY.json`` with its line of the manifest, and
    ``KEY.txt`` with its prompt. Packing again gives the same bytes, so a kill midway costs nothing:
    the loose images are deleted only once the manifest names the shards.

    Args:
        folder: Of a run whose images are all settled.

    Raises:
        OutputError: If the folder cannot be written to.
    """
    (folder.path / "shards").mkdir(exist_ok=True)
    manifest = folder.path / "manifest.jsonl"
    with writing(manifest) as merged:
        for index, lines in groupby(folder.lines(), key=lambda line: line["number"] // SHARD):
            name = f"shards/{index:06d}.tar"
            packed = [line | {"file": name, "shard_key": line["id"]} for line in lines]
            if any(_loose(folder, line).exists() for line in packed):
                with (
                    writing(folder.path / name) as file,
                    tarfile.open(fileobj=file, mode="w") as tar,
                ):
                    for line in packed:
                        _add_image(tar, line, _bytes(folder, line))
            for line in packed:
                merged.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
    for line in folder.lines():
        _loose(folder, line).unlink(missing_ok=True)


def _loose(folder: RunFolder, line: dict[str, Any]) -> Path:
    """The file of an image until it is packed; within the folder, whatever the line says."""
    return folder.images / Path(f"{line['id']}.png").name


def _bytes(folder: RunFolder, line: dict[str, Any]) -> bytes:
    """An image, from its own file or from the shard that it was packed into before."""
    loose = _loose(folder, line)
    if loose.exists():
        return loose.read_bytes()
    with tarfile.open(folder.path / line["file"]) as tar:
        member = tar.extractfile(f"{line['shard_key']}.png")
        if member is None:
            raise OutputError(f"{folder.path / line['file']} is damaged; delete it and start again")
        return member.read()


def _add_image(tar: tarfile.TarFile, line: dict[str, Any], image: bytes) -> None:
    parts = {
        "png": image,
        "json": json.dumps(line, ensure_ascii=False).encode(),
        "txt": line["prompt"].encode(),
    }
    for suffix, data in parts.items():
        info = tarfile.TarInfo(f"{line['shard_key']}.{suffix}")
        info.size = len(data)
        tar.addfile(info, BytesIO(data))
