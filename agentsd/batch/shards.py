"""Pack the images of a finished run into tar files that the ``webdataset`` library reads."""

from __future__ import annotations

import json
import tarfile
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import Any

from ..output import writing
from .run_folder import RunFolder

SHARD = 1000
"""Images of a shard."""


def pack(folder: RunFolder) -> None:
    """Move a run's images into ``shards/000000.tar``, …, and have its manifest say so.

    Members of one image share a key: ``KEY.png``, ``KEY.json`` with its line of the manifest, and
    ``KEY.txt`` with its prompt. Packing again gives the same bytes, so that being killed midway
    costs nothing: the loose images go only when the manifest names the shards.

    Args:
        folder: Of a run whose images are all settled.

    Raises:
        OutputError: If the place cannot be written to.
    """
    (folder.path / "shards").mkdir(exist_ok=True)
    manifest = folder.path / "manifest.jsonl"
    with writing(manifest) as merged:
        for index, lines in groupby(folder.lines(), key=lambda line: line["number"] // SHARD):
            name = f"shards/{index:06d}.tar"
            told = [line if "shard_key" in line else _packed(line, name) for line in lines]
            if any((folder.path / line["loose"]).exists() for line in told):
                with (
                    writing(folder.path / name) as file,
                    tarfile.open(fileobj=file, mode="w") as tar,
                ):
                    for line in told:
                        _add_image(tar, line, _bytes(folder.path, line))
            for line in told:
                merged.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
    for line in folder.lines():
        (folder.path / line["loose"]).unlink(missing_ok=True)


def _packed(line: dict[str, Any], shard: str) -> dict[str, Any]:
    return {**line, "file": shard, "shard_key": line["id"], "loose": line["file"]}


def _bytes(root: Path, line: dict[str, Any]) -> bytes:
    """An image, from where it lies loose or from the shard that it went into before."""
    loose = root / str(line["loose"])
    if loose.exists():
        return loose.read_bytes()
    with tarfile.open(root / line["file"]) as tar:
        member = tar.extractfile(f"{line['shard_key']}.png")
        return member.read() if member else b""


def _add_image(tar: tarfile.TarFile, line: dict[str, Any], image: bytes) -> None:
    told = {key: value for key, value in line.items() if key != "loose"}
    parts = {
        "png": image,
        "json": json.dumps(told, ensure_ascii=False).encode(),
        "txt": line["prompt"].encode(),
    }
    for suffix, data in parts.items():
        info = tarfile.TarInfo(f"{line['shard_key']}.{suffix}")
        info.size = len(data)
        tar.addfile(info, BytesIO(data))
