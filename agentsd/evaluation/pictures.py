"""Sets of images to measure: folders, folders that agentsd made, webdataset tars."""

from __future__ import annotations

import hashlib
import json
import tarfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ..errors import AgentSDError, EvaluationError
from ..files import files_below
from ..settings import short_repr
from ..text_files import decode_text, read_text, split_lines

SUFFIXES = (
    *(".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff"),
    ".webp",
)
"""Those that pytorch-fid reads, other names of JPEG, and GIF."""

MANIFEST = "manifest.jsonl"
RUN = "run.json"
"""What ``agentsd generate`` says of a run; it may be unfinished."""


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


def pictures(source: str | Path, *, unfinished: bool = False) -> list[Picture]:
    """List the images of a source, in order of their names, or of the manifest.

    Files that are neither images nor what belongs to them are counted in a warning.

    Args:
        source: A folder, read with its subfolders, linked ones too, but without hidden ones; a
            folder with ``manifest.jsonl``, of which the manifest's images are taken, with prompts
            and seeds (a run's folder ``images`` stands for the run); or a ``.tar`` as webdataset
            writes it, with prompts from ``KEY.txt`` or from ``prompt`` or ``caption`` in
            ``KEY.json``.
        unfinished: Take what there is of an unfinished run, and warn of the rest; else it is an
            error.

    Raises:
        EvaluationError: If there is no such source, no image in it, its manifest is broken, or it
            is an unfinished run.
    """
    path = Path(source)
    if path.name == "images" and (path.parent / RUN).is_file():
        path = path.parent  # whose manifest tells of hidden images, and of missing ones
    if path.is_dir():
        is_listed = bool(_parts(path, "manifest")) or (path / RUN).is_file()
        found = _of_manifest(path, unfinished) if is_listed else _of_folder(path)
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
    files = _files(folder)
    images = [file for file in files if file.suffix.lower() in SUFFIXES]
    others = {file for file in files if file.suffix.lower() != ".txt"} - {*images}
    _warn_of_others(folder, [file.suffix.lower() or file.name for file in others])
    return [Picture(str(file), partial(_read, file), _caption(file)) for file in images]


def _files(folder: Path) -> list[Path]:
    try:
        return sorted(files_below(folder))
    except OSError as error:
        raise EvaluationError(f"{error.filename}: cannot be read ({error.strerror})") from None


def _caption(image: Path) -> str | None:
    beside = image.with_suffix(".txt")
    return read_text(beside, EvaluationError).strip() or None if beside.is_file() else None


def _warn_of_others(place: Path, kinds: list[str]) -> None:
    """Say what of a source is not read."""
    if kinds:
        counts = ", ".join(f"{count} {kind}" for kind, count in Counter(sorted(kinds)).items())
        warnings.warn(f"{place}: files left out: {len(kinds)} ({counts})", stacklevel=2)


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise EvaluationError(f"{file}: cannot be read ({error.strerror or error})") from error


def _of_manifest(folder: Path, unfinished: bool) -> list[Picture]:
    is_run = (folder / RUN).is_file()
    parts = _parts(folder, "manifest")
    entries = [entry for part in parts for entry in read_manifest(part, growing=is_run)]
    if is_run:
        entries = _of_run(folder, entries, unfinished)
    found = []
    shards: dict[Path, dict[str, Picture]] = {}
    for entry in entries:
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


def _parts(folder: Path, kind: str) -> list[Path]:
    """Files of a run: one, or until it is finished one of each process."""
    return sorted({*folder.glob(f"{kind}.jsonl"), *folder.glob(f"{kind}.*.jsonl")})


def _of_run(folder: Path, entries: list[dict[str, Any]], unfinished: bool) -> list[dict[str, Any]]:
    """The entries of a run of ``agentsd generate``, in order, each image once.

    Raises:
        EvaluationError: If images are still to be made, and an unfinished run will not do.
    """
    failures = [line for part in _parts(folder, "failed") for line in _json_lines(part, True)]
    try:
        total = int(json.loads(_read(folder / RUN))["config"]["images"])
        made = {int(entry["number"]): entry for entry in entries}
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
        lack = f"{folder}: the run is unfinished; images missing: {missing} of {total}"
        if not unfinished:
            raise EvaluationError(
                f"{lack}; start agentsd generate again with the same options to make them, "
                "or measure those that are there with --unfinished"
            )
        warnings.warn(lack, stacklevel=2)
    return [made[number] for number in sorted(made)]


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


def read_manifest(path: Path, *, growing: bool = False) -> list[dict[str, Any]]:
    """The entries of a manifest: JSON objects, one a line, each with at least a ``file``.

    Args:
        path: Of the manifest.
        growing: Whether a last line without its end, which a kill may leave, is ignored.

    Raises:
        EvaluationError: Names the file and the line.
    """
    entries = []
    for number, entry in _json_lines(path, growing):
        if not isinstance(entry, dict) or not isinstance(entry.get("file"), str):
            raise EvaluationError(
                f"{path}, line {number}: expected an object with a file (got {short_repr(entry)})"
            )
        entries.append(entry)
    return entries


def _json_lines(path: Path, growing: bool) -> Iterator[tuple[int, Any]]:
    """The lines of a file with their numbers."""
    data = _read(path)
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


def _of_tar(path: Path) -> list[Picture]:
    members: dict[str, dict[str, tarfile.TarInfo]] = {}
    others: list[str] = []
    try:
        with tarfile.open(path, "r:") as tar:  # images are read in place, so not a compressed one
            for member in tar:
                place = PurePosixPath(member.name)
                key, _, suffix = place.name.partition(".")  # webdataset's rule: the first dot
                if member.isfile() and key:
                    members.setdefault(str(place.with_name(key)), {})[f".{suffix.lower()}"] = member
                elif key and not member.isdir():
                    others.append("link")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise EvaluationError(f"{path} is not a whole tar without compression ({error})") from None
    found = []
    for _, parts in sorted(members.items()):
        image, *more = [suffix for suffix in parts if suffix in SUFFIXES] or [""]
        others += more
        others += [suffix for suffix in parts if suffix not in (*SUFFIXES, ".txt", ".json")]
        if image:
            member = parts[image]
            read = partial(_extract, path, member)
            found.append(Picture(f"{path}:{member.name}", read, **_told(path, parts)))
    _warn_of_others(path, others)
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
    texts = {k: v for k, v in known.items() if isinstance(v, str)} if type(known) is dict else {}
    prompt = texts.get("prompt", texts.get("caption"))
    if ".txt" in parts:
        place = f"{path}:{parts['.txt'].name}"
        text = decode_text(_extract(path, parts[".txt"]), place, EvaluationError)
        prompt = text.strip() or None
    hidden = isinstance(known, dict) and bool(known.get("nsfw_content_detected"))
    return {"prompt": prompt, "model": texts.get("model"), "hidden": hidden}


def prompt_lines(file: Path, error: type[AgentSDError]) -> list[str]:
    """The prompts of a text file, one a line.

    Raises:
        error: If the file cannot be read, or its name is that of a table or of JSON.
    """
    if file.suffix.lower() in (".csv", ".json", ".jsonl", ".tsv", ".yaml", ".yml"):
        raise error(f"{file}: prompts are read from plain text, one a line, not {file.suffix}")
    return split_lines(read_text(file, error))


def given_prompts(found: list[Picture], file: Path) -> list[Picture]:
    """The pictures with prompts from a text file, one a line, in the pictures' order.

    Raises:
        EvaluationError: If there are not as many lines as pictures, or one is empty.
    """
    lines = prompt_lines(file, EvaluationError)
    if len(lines) != len(found):
        raise EvaluationError(
            f"{file} has {len(lines)} prompts for {len(found)} images; one a line is needed"
        )
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise EvaluationError(f"{file}:{number}: empty")
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
