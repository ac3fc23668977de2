"""Sets of images to measure: folders, folders that agentsd made, webdataset tars."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from PIL import Image, ImageOps

from ..errors import EvaluationError
from ..validation import shown

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""Those that pytorch-fid reads."""

MANIFEST = "manifest.jsonl"


class Picture(NamedTuple):
    """An image that may be read, with what is known of it."""

    name: str
    """As errors call it."""
    read: Callable[[], bytes]
    prompt: str | None = None
    seed: int | None = None
    digest: str | None = None
    """SHA-256 that its manifest gives."""
    model: str | None = None
    hidden: bool = False
    """Whether a safety checker put a black image in its place."""


@dataclass(frozen=True)
class Reading:
    """How images are read. As it comes, nothing of an image is changed silently.

    Args:
        size: Crop to a centred square and resize it (Lanczos, smoothed) to this many pixels;
            ``None`` takes images as they are, which must then be of one size.
        convert: Turn grey, palette, CMYK and transparent images to RGB, as pytorch-fid does:
            transparency is dropped. Without it, they are errors.
        skip_bad: Leave out images that cannot be used, and report them, rather than stop.
    """

    size: int | None = None
    convert: bool = False
    skip_bad: bool = False

    @property
    def manner(self) -> str:
        """What it makes of an image, for the keys of caches."""
        return f"-{self.size}-{'rgb' if self.convert else ''}"


def pictures(source: str | Path) -> list[Picture]:
    """List the images of a source, in order of their names, or of the manifest.

    Args:
        source: A folder, read with its subfolders; a folder with ``manifest.jsonl``, of which the
            manifest's images are taken, with prompts and seeds; or a ``.tar`` as webdataset
            writes it, with prompts from ``KEY.txt`` or from ``prompt`` or ``caption`` in
            ``KEY.json``.

    Raises:
        EvaluationError: If there is no such source, no image in it, or its manifest is broken.
    """
    path = Path(source)
    if path.is_dir():
        found = _of_manifest(path) if (path / MANIFEST).is_file() else _of_folder(path)
    elif path.is_file() and path.suffix == ".tar":
        found = _of_tar(path)
    elif path.exists():
        raise EvaluationError(f"{path} is neither a folder of images nor a .tar")
    else:
        raise EvaluationError(f"{path}: there is no such folder or .tar of images")
    if not found:
        raise EvaluationError(f"{path} holds no image ({', '.join(SUFFIXES)})")
    return found


def _of_folder(folder: Path) -> list[Picture]:
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    )
    found = []
    for file in files:
        beside = file.with_suffix(".txt")
        prompt = beside.read_text(encoding="utf-8").strip() if beside.is_file() else None
        found.append(Picture(str(file), partial(_read, file), prompt))
    return found


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise EvaluationError(f"{file}: cannot be read ({error.strerror or error})") from error


def _of_manifest(folder: Path) -> list[Picture]:
    found = []
    shards: dict[Path, dict[str, Picture]] = {}
    for entry in read_manifest(folder / MANIFEST):
        file = folder / entry["file"]
        picture = Picture(str(file), partial(_read, file))
        if "shard_key" in entry:
            if file not in shards:
                shards[file] = {picture.name: picture for picture in _of_tar(file)}
            name = f"{file}:{entry['shard_key']}.png"
            if name not in shards[file]:
                raise EvaluationError(f"{name}: the shard does not hold what the manifest says")
            picture = shards[file][name]
        known: Any = {name: entry.get(name) for name in ("prompt", "seed", "model")}
        hidden = bool(entry.get("nsfw_content_detected"))
        found.append(picture._replace(digest=entry.get("sha256"), hidden=hidden, **known))
    return found


def visible(found: list[Picture]) -> list[Picture]:
    """The images without those that a safety checker put black ones in the place of.

    Raises:
        EvaluationError: If none is left.
    """
    left = [picture for picture in found if not picture.hidden]
    if not left:
        raise EvaluationError(f"{HIDDEN}: all {len(found)} images, such as {found[0].name}")
    return left


HIDDEN = "replaced with a black image by a safety checker"


def read_manifest(path: Path) -> list[dict[str, Any]]:
    """The entries of a manifest: JSON objects, one a line, each with at least a ``file``.

    Raises:
        EvaluationError: Names the file and the line.
    """
    entries = []
    for number, line in enumerate(_read(path).decode("utf-8", "replace").splitlines(), start=1):
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict) or not isinstance(entry.get("file"), str):
                raise ValueError("an object with a file was expected")
        except ValueError as error:
            raise EvaluationError(f"{path}, line {number}: {error} (got {shown(line)})") from None
        entries.append(entry)
    return entries


def _of_tar(path: Path) -> list[Picture]:
    members: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                place = PurePosixPath(member.name)
                key, _, suffix = place.name.partition(".")  # webdataset's rule: the first dot
                if member.isfile() and key:
                    members.setdefault(str(place.with_name(key)), {})[f".{suffix.lower()}"] = member
    except (tarfile.TarError, OSError, EOFError) as error:
        raise EvaluationError(f"{path} is not a whole tar ({error})") from None
    found = []
    for _, parts in sorted(members.items()):
        image = next((part for suffix, part in parts.items() if suffix in SUFFIXES), None)
        if image is not None:
            name = f"{path}:{image.name}"
            found.append(Picture(name, partial(_extract, path, image), **_told(path, parts)))
    return found


def _extract(path: Path, member: tarfile.TarInfo) -> bytes:
    with path.open("rb") as file:
        file.seek(member.offset_data)
        return file.read(member.size)


def _told(path: Path, parts: dict[str, tarfile.TarInfo]) -> dict[str, Any]:
    """Prompt and model of an image, as far as the parts beside it tell."""
    known: Any = {}
    if ".json" in parts:
        try:
            known = json.loads(_extract(path, parts[".json"]))
        except ValueError as error:
            raise EvaluationError(f"{path}:{parts['.json'].name}: no JSON ({error})") from None
    texts = {k: v for k, v in known.items() if isinstance(v, str)} if known else {}
    prompt = texts.get("prompt", texts.get("caption"))
    if ".txt" in parts:
        prompt = _extract(path, parts[".txt"]).decode("utf-8", "replace").strip()
    hidden = isinstance(known, dict) and bool(known.get("nsfw_content_detected"))
    return {"prompt": prompt, "model": texts.get("model"), "hidden": hidden}


def given_prompts(found: list[Picture], file: Path) -> list[Picture]:
    """The pictures with prompts from a text file, one a line, in the pictures' order.

    Raises:
        EvaluationError: If there are not as many lines as pictures.
    """
    lines = _read(file).decode("utf-8", "replace").splitlines()
    if len(lines) != len(found):
        raise EvaluationError(
            f"{file} has {len(lines)} prompts for {len(found)} images; one a line is needed"
        )
    return [p._replace(prompt=line) for p, line in zip(found, lines, strict=True)]


def digest_of(picture: Picture, data: bytes) -> str:
    """SHA-256 of an image's file, which must be the one that its manifest gives.

    Raises:
        EvaluationError: If it is another.
    """
    digest = hashlib.sha256(data).hexdigest()
    if picture.digest not in (None, digest):
        raise EvaluationError(f"{picture.name} has changed since its manifest was written")
    return digest


def opened(name: str, data: bytes, reading: Reading) -> Image.Image:
    """Open an image without decoding it, and check what its header tells.

    Raises:
        EvaluationError: If it is none, has 16 bits a channel, or is not RGB and may not be
            converted.
    """
    try:
        image = Image.open(BytesIO(data))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise EvaluationError(f"{name}: no image that can be read ({_first(error)})") from None
    # Pillow quietly halves the bits of 16-bit colour; what it reads from tells.
    deep = any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))
    if deep or image.mode.startswith(("I", "F")):
        raise EvaluationError(f"{name}: has more than 8 bits a channel; save it with 8")
    if image.mode != "RGB" and not reading.convert:
        raise EvaluationError(
            f"{name}: is {image.mode}, not RGB; --convert takes it as pytorch-fid does"
        )
    return image


def decoded(name: str, image: Image.Image, reading: Reading) -> Image.Image:
    """Decode what :func:`opened` opened, to RGB, at the size that is asked for.

    Raises:
        EvaluationError: If the file is cut short or damaged.
    """
    try:
        rgb = image.convert("RGB")
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise EvaluationError(f"{name}: is damaged or cut short ({_first(error)})") from None
    if reading.size is None:
        return rgb
    return ImageOps.fit(rgb, (reading.size,) * 2, Image.Resampling.LANCZOS)


def _first(error: BaseException) -> str:
    text = str(error).replace("<_io.BytesIO object at ", "").split("\n")[0]
    return "unknown format" if text.startswith("cannot identify") else text
