"""Small image sets to measure, with and without metadata."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "white", "black")


def noise(seed: int, size: tuple[int, int] = (32, 32)) -> Image.Image:
    """A coloured background with noise that depends on the seed."""
    ground = np.asarray(Image.new("RGB", size, COLOURS[seed % 8]), np.int16)
    draw = np.random.default_rng(seed)
    return Image.fromarray(
        (ground + draw.integers(-40, 40, ground.shape)).clip(0, 255).astype("u1")
    )


def folder(path: Path, count: int = 6, first: int = 0) -> Path:
    """A plain folder."""
    path.mkdir(parents=True)
    for i in range(count):
        noise(first + i).save(path / f"{i:03}.png")
    return path


def manifest(path: Path, count: int = 6, first: int = 0, hidden: tuple[int, ...] = ()) -> Path:
    """A folder as agentsd makes it, with two seeds per prompt; some images are hidden."""
    folder(path / "images", count, first)
    lines = []
    for i in range(count):
        file = f"images/{i:03}.png"
        digest = hashlib.sha256((path / file).read_bytes()).hexdigest()
        prompt = f"a {COLOURS[i // 2 % 8]} circle on a black background"
        line = {"id": i, "prompt": prompt, "seed": i, "file": file, "sha256": digest}
        lines.append(line | {"nsfw_content_detected": i in hidden})
    (path / "manifest.jsonl").write_text(
        "".join(json.dumps(line | {"model": "pocket"}) + "\n" for line in lines)
    )
    return path


def tar(path: Path, count: int = 6, first: int = 0) -> Path:
    """A webdataset tar, with prompts as text for even and as JSON for odd images."""
    with tarfile.open(path, "w") as file:

        def add(name: str, data: bytes) -> None:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))

        for i in range(count):
            data = io.BytesIO()
            noise(first + i).save(data, "PNG")
            add(f"part/{i:03}.png", data.getvalue())
            prompt = f"a {COLOURS[i // 2 % 8]} circle on a black background"
            if i % 2:
                add(f"part/{i:03}.json", json.dumps({"caption": prompt}).encode())
            else:
                add(f"part/{i:03}.txt", prompt.encode())
    return path
