"""Sets of images to measure: a folder, an agentsd run, or a webdataset tar."""

from __future__ import annotations

from pathlib import Path

from ...errors import EvaluationError
from .entry import HIDDEN, SUFFIXES, ImageEntry, visible, with_prompts
from .folder import MANIFEST, RUN, is_run_or_manifest, read_folder, read_manifest, read_run
from .tar import read_tar

__all__ = [
    "HIDDEN",
    "MANIFEST",
    "ImageEntry",
    "read_image_set",
    "read_manifest",
    "visible",
    "with_prompts",
]


def read_image_set(source: str | Path, *, unfinished: bool = False) -> list[ImageEntry]:
    """List the images of a set, sorted by name, or in the order of the manifest.

    A warning counts the files in the set that are not read.

    Args:
        source: A folder, read with its subfolders (linked ones too, hidden ones not); a folder with
            a ``manifest.jsonl``, which then lists the images with their prompts and seeds (the
            folder ``images`` of a run stands for the run); or an uncompressed webdataset ``.tar``,
            with prompts from ``KEY.txt``, or from ``prompt`` or ``caption`` in ``KEY.json``.
        unfinished: Accept an unfinished run, with a warning; otherwise it is an error.

    Raises:
        EvaluationError: If the source does not exist or holds no image, its manifest is broken, or
            it is an unfinished run.
    """
    path = Path(source)
    if path.name == "images" and (path.parent / RUN).is_file():
        path = path.parent  # its manifest shows which images are hidden or missing
    if path.is_dir():
        images = read_run(path, unfinished) if is_run_or_manifest(path) else read_folder(path)
    elif path.is_file() and path.suffix == ".tar":
        images = read_tar(path)
    elif path.exists():
        raise EvaluationError(f"{path} is neither a folder of images nor a .tar")
    else:
        raise EvaluationError(f"{path}: there is no such folder or .tar of images")
    if not images:
        raise EvaluationError(f"{path} holds no image ({', '.join(SUFFIXES)})")
    return images
